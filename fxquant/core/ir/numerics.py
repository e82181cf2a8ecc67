"""Scales, zero-points and rounding: pure tensor functions.

Rounding is half to even, then clamping, as ONNX QuantizeLinear and `quantized_decomposed` do it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.core.ir.spec import QuantSpec

SMALLEST_SCALE = 2.0**-40
"""Floor of every scale: keeps constant and dead channels finite, far below any useful step."""

SEARCH_STEPS = 40
SEARCH_LOWEST = 0.3


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return `clamp(round(x / scale) + zero_point, qmin, qmax)` as int32, of the shape of x.

    Args:
        x: float tensor of any shape.
        scale: shape `()` or `(channels,)` along `spec.channel_axis`, above 0.
        zero_point: integers of the shape of scale, within the grid.
        spec: the grid.
    """
    scale, zero_point = _aligned(x, scale, spec), _aligned(x, zero_point, spec)
    return torch.clamp(torch.round(x / scale) + zero_point, spec.qmin, spec.qmax).to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return `(q - zero_point) * scale` as float32, of the shape of q."""
    scale, zero_point = _aligned(q, scale, spec), _aligned(q, zero_point, spec)
    return (q - zero_point).to(scale.dtype) * scale


def round_trip(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return `dequantize(quantize(x))`: x as the integer kernel will see it."""
    return dequantize(quantize(x, scale, zero_point, spec), scale, zero_point, spec)


def _aligned(x: Tensor, parameter: Tensor, spec: QuantSpec) -> Tensor:
    if spec.channel_axis is None or parameter.dim() == 0:
        return parameter
    shape = [1] * x.dim()
    shape[spec.channel_axis] = -1
    return parameter.reshape(shape)


def affine_parameters(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return scale and zero_point of the grid that covers `[low, high]` and zero.

    `scale = (high - low) / (qmax - qmin)`, `zero_point = round(qmin - low / scale)`; symmetric grids use
    `scale = max(-low / -qmin, high / qmax)` and zero_point 0. Zero is always exactly on the grid.

    Args:
        low: float tensor, any shape; values above 0 count as 0.
        high: the same shape; values below 0 count as 0.
        spec: the grid.

    Returns:
        scale (float32, at least 2^-40) and zero_point (int32), of the shape of low.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if spec.symmetric:
        scale = torch.maximum(low / spec.qmin, high / spec.qmax).clamp(min=SMALLEST_SCALE)
        return scale.float(), torch.zeros_like(scale, dtype=torch.int32)
    scale = ((high - low) / (spec.qmax - spec.qmin)).clamp(min=SMALLEST_SCALE)
    zero_point = torch.round(spec.qmin - low / scale).clamp(spec.qmin, spec.qmax)
    return scale.float(), zero_point.to(torch.int32)


def weight_parameters(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the scale per channel that minimises the squared rounding error, by search over clip ratios.

    `argmin_r sum((w - round_trip(w; r * max|w| / qmax))^2)` over 40 ratios r in [0.3, 1], each channel on its own,
    starting at `-qmin` for the negative side so that the full signed range is used.

    Args:
        weight: float tensor with channels along `spec.channel_axis`.
        spec: symmetric grid.

    Returns:
        scale (float32) and zero_point (int32 zeros), shape `(channels,)`.
    """
    axis = spec.channel_axis or 0
    rows = weight.detach().float().movedim(axis, 0).reshape(weight.shape[axis], -1)
    row_spec = QuantSpec(spec.bits, spec.signed, spec.symmetric, channel_axis=0)
    # 1.0 is the scale that clips nothing; both signs reach their own end of the lopsided signed range.
    widest, zero_point = affine_parameters(rows.amin(dim=1), rows.amax(dim=1), row_spec)
    symmetric = (rows.abs().amax(dim=1) / spec.qmax).clamp(min=SMALLEST_SCALE)
    best, best_error = widest, torch.full_like(widest, torch.inf)
    for ratio in torch.linspace(SEARCH_LOWEST, 1.0, SEARCH_STEPS).tolist():
        for reference in (widest, symmetric) if ratio == 1.0 else (symmetric,):
            scale = (reference * ratio).clamp(min=SMALLEST_SCALE)
            # The fused kernel keeps this search, dozens of passes over every weight, out of the way.
            rounded = torch.fake_quantize_per_channel_affine(rows, scale, zero_point, 0, spec.qmin, spec.qmax)
            error = rounded.sub_(rows).square_().sum(dim=1)
            better = error < best_error
            best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best, zero_point
