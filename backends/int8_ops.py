"""The integer convolution as `torch.ops.fxquant.conv2d_u8`, for compilers that trace.

Inductor and torch.export cannot see through oneDNN's packed weights: this op takes the plain int8 weight, and the
kernel keeps the packed one beside it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fxquant.backends.int8_kernels import UINT8_MAX, ConvGeometry, Grid, conv2d, conv_kernel_is_exact

torch.library.define(
    "fxquant::conv2d_u8",
    "(Tensor x, Tensor weight, Tensor scales, Tensor? bias, float x_scale, int x_zero_point, int[] stride, "
    "int[] padding, int[] dilation, int groups, float scale, int zero_point, int low, int high, bool integer_output, "
    "bool exact) -> Tensor",
)


@torch.library.impl("fxquant::conv2d_u8", "CPU")
def _conv2d_op(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: float,
    zero_point: int,
    low: int,
    high: int,
    integer_output: bool,
    exact: bool,
) -> Tensor:
    sizes = tuple((size[0], size[1]) for size in (stride, padding, dilation))
    source, geometry, out = _parameters(
        x_scale, x_zero_point, sizes, groups, (scale, zero_point, low, high) if integer_output else None
    )
    return conv2d(x, weight, scales, bias, source, geometry, out, exact or not conv_kernel_is_exact())


@cache
def _parameters(
    x_scale: float,
    x_zero_point: int,
    sizes: tuple[tuple[int, int], ...],
    groups: int,
    out: tuple[float, int, int, int] | None,
) -> tuple[Grid, ConvGeometry, Grid | None]:
    """Return the arguments of a call as validated objects, made once per layer."""
    geometry = ConvGeometry(sizes[0], sizes[1], sizes[2], groups)
    return Grid(x_scale, x_zero_point, 0, UINT8_MAX), geometry, None if out is None else Grid(*out)


def _conv2d_fake(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: float,
    zero_point: int,
    low: int,
    high: int,
    integer_output: bool,
    exact: bool,
) -> Tensor:
    del scales, bias, x_scale, x_zero_point, groups, scale, zero_point, low, high, exact
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    dtype = torch.uint8 if integer_output else torch.float32
    shape = (x.shape[0], weight.shape[0], *sizes)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


torch.library.register_fake("fxquant::conv2d_u8", _conv2d_fake)


def conv2d_op(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    grid: Grid,
    geometry: ConvGeometry,
    out: Grid | None,
    exact: bool = False,
) -> Tensor:
    """Return `conv2d` through `torch.ops.fxquant.conv2d_u8`, which tracing compilers keep as one call."""
    target = out or grid
    made: Tensor = torch.ops.fxquant.conv2d_u8(
        *(x, weight, scales, bias, grid.scale, grid.zero_point, *geometry.sizes, geometry.groups),
        *(target.scale, target.zero_point, target.low, target.high, out is not None, exact),
    )
    return made
