"""The ops of an explicit integer graph: quantize, dequantize, in plain tensor arithmetic.

They are functions rather than registered operators, so that such a graph runs, exports and differentiates anywhere
ATen does; a backend recognises them by identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

EDGE = "edge"
"""Key of a node's meta: name of the simulated quantizer whose integers the node makes."""

INT32_LIMIT = 2**30
"""Largest quantized bias: half the range of int32, the other half is left to the products."""


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return `clamp(round(x / scale) + zero_point, qmin, qmax)` as uint8, of the shape of x.

    Rounding is half to even, as ONNX QuantizeLinear does it; scale and zero_point are scalars.
    """
    return torch.clamp(torch.round(x / scale) + zero_point, qmin, qmax).to(torch.uint8)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return `(q - zero_point) * scale` as float32, of the shape of q."""
    return (q.to(torch.float32) - zero_point) * scale


def dequantize_channels(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Return `q * scale` as float32, of the shape of q.

    Args:
        q: int8 weights, or an int32 bias.
        scale: shape `(q.shape[axis],)`.
        axis: axis that counts channels.
    """
    shape = [1] * q.dim()
    shape[axis] = -1
    return q.to(torch.float32) * scale.reshape(shape)


def stored_channels(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Return the same for a weight that is only stored as integers, and that its op multiplies in float."""
    return dequantize_channels(q, scale, axis)
