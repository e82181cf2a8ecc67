"""`Grid`: the values a quantized tensor may take, and the arithmetic of rounding to them.

Rounding is half to even, then clamping, as ONNX QuantizeLinear and `quantized_decomposed` do it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.core.errors import OptionError
from fxquant.core.ir.levels import HIGHEST_LEVEL, LOWEST_LEVEL, nearest_level
from fxquant.core.ir.spec import QuantSpec, weight_spec

SMALLEST_SCALE = 2.0**-40
"""Floor of every scale: keeps constant and dead channels finite, far below any useful step."""

SEARCH_STEPS = 40
SEARCH_LOWEST = 0.3
CACHED = 1 << 17
"""Weights whose rounding error is computed at a time."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The values `(q - zero_point) * scale` for the integers q of a spec, or for some of them.

    Kernels multiply int8 integers whatever the format of a weight: a codebook, powers of two or channels of several
    widths only say which of the integers a channel uses.

    Args:
        spec: width and sign of the integers, and the axis that counts channels.
        scale: float, shape `()` or `(channels,)`, above 0.
        zero_point: integers of the shape of scale, within the spec.
        levels: the integers that each channel may use, int8 of shape `(channels, L)`, ascending along the last axis; a
            channel with fewer of them repeats its largest. None for all integers of the spec.

    Raises:
        OptionError: scale and zero_point have different shapes, or levels do not fit them or int8 weights.
    """

    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor
    levels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.scale.shape != self.zero_point.shape:
            shapes = f"{tuple(self.scale.shape)} and {tuple(self.zero_point.shape)}"
            raise OptionError(f"scale and zero_point of a grid have shapes {shapes}; give them the same one")
        if self.levels is not None:
            _check_levels(self.levels, self.spec, len(self.scale) if self.scale.dim() else None)

    @staticmethod
    def covering(low: Tensor, high: Tensor, spec: QuantSpec) -> Grid:
        """Return the grid that covers `[low, high]` and zero.

        `scale = (high - low) / (qmax - qmin)`, `zero_point = round(qmin - low / scale)`; symmetric grids use
        `scale = max(-low / -qmin, high / qmax)` and zero_point 0. Zero is always exactly on the grid. The scale is
        float32 and at least 2^-40, the zero_point int32, both of the shape of low.

        Args:
            low: float tensor, shape `()` or `(channels,)`; values above 0 count as 0.
            high: the same shape; values below 0 count as 0.
            spec: of the grid.
        """
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        if spec.symmetric:
            scale = torch.maximum(low / spec.qmin, high / spec.qmax).clamp(min=SMALLEST_SCALE)
            return Grid(spec, scale.float(), torch.zeros_like(scale, dtype=torch.int32))
        scale = ((high - low) / (spec.qmax - spec.qmin)).clamp(min=SMALLEST_SCALE)
        zero_point = torch.round(spec.qmin - low / scale).clamp(spec.qmin, spec.qmax)
        return Grid(spec, scale.float(), zero_point.to(torch.int32))

    @staticmethod
    def of_weight(weight: Tensor, bits: int, channel_axis: int = 0, per_channel: bool = True) -> Grid:
        """Return the grid of a weight with the scales of least squared error, by search over clip ratios.

        `argmin_r sum((w - round_trip(w; r * max|w| / qmax))^2)` over 40 ratios r in [0.3, 1], each channel on its own,
        starting at `-qmin` for the negative side so that the full signed range is used. Scale (float32) and zero_point
        (int32 zeros) have shape `(channels,)`.

        Args:
            weight: float tensor.
            bits: width of the grid.
            channel_axis: axis of the weight that counts output channels.
            per_channel: False finds one scale for all channels, which all of them get.
        """
        spec, channels = weight_spec(bits, channel_axis), weight.shape[channel_axis]
        weight = weight.detach().float()
        rows = weight.movedim(channel_axis, 0).reshape(channels, -1) if per_channel else weight.reshape(1, -1)
        # 1.0 is the scale that clips nothing; both signs reach their own end of the lopsided signed range.
        widest = Grid.covering(rows.amin(dim=1), rows.amax(dim=1), spec)
        symmetric = (rows.abs().amax(dim=1) / spec.qmax).clamp(min=SMALLEST_SCALE)
        best, best_error = widest.scale, torch.full_like(widest.scale, torch.inf)
        for ratio in torch.linspace(SEARCH_LOWEST, 1.0, SEARCH_STEPS).tolist():
            for reference in (widest.scale, symmetric) if ratio == 1.0 else (symmetric,):
                scale = (reference * ratio).clamp(min=SMALLEST_SCALE)
                error = _rounding_error(rows, scale, spec)
                better = error < best_error
                best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
        return Grid(spec, best.expand(channels).clone(), widest.zero_point.expand(channels).clone())

    def quantize(self, x: Tensor) -> Tensor:
        """Return the nearest integers of the grid as int32, of the shape of x."""
        if self.levels is not None:
            rows = self._as_rows(x / self.along(x, self.scale))
            return self._from_rows(nearest_level(rows, self.levels), x).to(torch.int32)
        scaled = torch.round(x / self.along(x, self.scale)) + self.along(x, self.zero_point)
        return torch.clamp(scaled, self.spec.qmin, self.spec.qmax).to(torch.int32)

    def dequantize(self, q: Tensor) -> Tensor:
        """Return the values of integers of the grid, `(q - zero_point) * scale`, in the type of scale."""
        return (q - self.along(q, self.zero_point)).to(self.scale.dtype) * self.along(q, self.scale)

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the integers of the grid next below and next above each value, both of the shape of x.

        Beyond an end of the grid both are that end; at a value of the grid the lower one is the value itself.
        """
        exact = x / self.along(x, self.scale)
        if self.levels is not None:
            rows, levels = self._as_rows(exact).contiguous(), self.levels.to(x.dtype)
            above = torch.searchsorted(levels, rows, right=True)
            ends = (above - 1, above)
            low, high = (self._from_rows(levels.gather(1, i.clamp(0, levels.shape[1] - 1)), x) for i in ends)
            return low, high
        floor = torch.floor(exact) + self.along(x, self.zero_point)
        return floor.clamp(self.spec.qmin, self.spec.qmax), (floor + 1).clamp(self.spec.qmin, self.spec.qmax)

    @property
    def spacing(self) -> Tensor:
        """How far apart the integers in use are on average: 1, or `(largest - smallest) / (levels - 1)` by channel."""
        if self.levels is None:
            return torch.ones_like(self.scale)
        levels = self.levels.float()
        count = (levels[:, 1:] > levels[:, :-1]).sum(dim=1).clamp(min=1)
        return ((levels[:, -1] - levels[:, 0]) / count).clamp(min=1.0)

    def round_trip(self, x: Tensor) -> Tensor:
        """Return `dequantize(quantize(x))`: x as the integer kernel will see it."""
        return self.dequantize(self.quantize(x))

    def along(self, x: Tensor, parameter: Tensor) -> Tensor:
        """Return a parameter, of shape `()` or `(channels,)`, so that it broadcasts along the channel axis of x."""
        if self.spec.channel_axis is None or parameter.dim() == 0:
            return parameter
        shape = [1] * x.dim()
        shape[self.spec.channel_axis] = -1
        return parameter.reshape(shape)

    def _as_rows(self, x: Tensor) -> Tensor:
        return x.movedim(self.spec.channel_axis or 0, 0).flatten(1)

    def _from_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        axis = self.spec.channel_axis or 0
        return rows.reshape(like.movedim(axis, 0).shape).movedim(0, axis)


def _check_levels(levels: Tensor, spec: QuantSpec, channels: int | None) -> None:
    """Fail unless levels can be used by int8 kernels.

    Raises:
        OptionError: a wrong type or shape, integers outside the spec, or a row that descends.
    """
    if levels.dtype != torch.int8 or levels.dim() != 2 or levels.shape[0] != channels or levels.shape[1] < 1:
        raise OptionError(
            f"levels of a grid are {levels.dtype} of shape {tuple(levels.shape)}; give int8 of shape ({channels}, L)"
        )
    if (spec.qmin, spec.qmax) != (LOWEST_LEVEL, HIGHEST_LEVEL) or not spec.symmetric:
        raise OptionError(f"levels need the symmetric int8 grid, not {spec}")
    if bool((levels[:, 1:] < levels[:, :-1]).any()):
        raise OptionError("levels of a grid descend in a row; sort them")


def _rounding_error(rows: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return the squared error of every row rounded to nearest without a zero-point.

    A search makes dozens of passes over every weight: few rows at a time stay in the cache (2.4 M weights: 2 ms, by
    `torch.fake_quantize_per_channel_affine` 12 ms).
    """
    few = max(1, CACHED // rows.shape[1])
    errors = []
    for part, step in zip(torch.split(rows, few), torch.split(scale.unsqueeze(1), few), strict=True):
        rounded = (part * (1 / step)).round_().clamp_(spec.qmin, spec.qmax).mul_(step)
        errors.append(rounded.sub_(part).square_().sum(dim=1))
    return torch.cat(errors)
