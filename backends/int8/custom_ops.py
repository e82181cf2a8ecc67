"""Integer layers and padding as ops of `torch.ops.fxquant`, for compilers that trace.

Inductor and torch.export cannot see through oneDNN's packed weights: these ops take the weight as it is saved, with
numbers that say its form (`packed_weight`), and keep beside it what kernels want. Grids travel as three lists, because
every argument of an op that is written in Python costs a microsecond of each call:

    steps     scale of the input, of the output (0 for float32), of the addend (0 for none)
    points    zero-point of the input and of the output, its smallest and largest integer, zero-point of the addend
    geometry  stride, padding, dilation (height, width), groups
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxquant.backends.affine import UINT8_MAX, ByteGrid
from fxquant.backends.int8.geometry import ConvGeometry, ConvGrids
from fxquant.backends.int8.kernels import (
    ConvCall,
    conv_kernel_is_exact,
    matmul,
    matmul_kernel_is_exact,
    pad_u8,
    prepared_conv,
)
from fxquant.backends.int8.packed_layer import unpacked_weight

torch.library.define(
    "fxquant::conv2d_u8",
    "(Tensor x, Tensor? addend, Tensor weight, int[] form, Tensor scales, Tensor? bias, float[] steps, "
    "int[] points, int[] geometry, bool exact) -> Tensor",
)

_CALLS: MutableMapping[Tensor, dict[object, ConvCall]] = WeakTensorKeyDictionary()
"""Packed weight -> what was prepared for it, by everything else; an entry lives as long as the weight."""


@torch.library.impl("fxquant::conv2d_u8", "CPU")
def _conv2d_op(
    x: Tensor,
    addend: Tensor | None,
    weight: Tensor,
    form: list[int],
    scales: Tensor,
    bias: Tensor | None,
    steps: list[float],
    points: list[int],
    geometry: list[int],
    exact: bool,
) -> Tensor:
    known = _CALLS.get(weight)
    if known is None:
        known = _CALLS[weight] = {}
    # The prepared call holds scales and bias, so that their addresses name them as long as it lives.
    key = (id(scales), id(bias), *steps, *points, *geometry, exact)
    call = known.get(key)
    if call is None:
        shape, grids = ConvGeometry(*_pairs(geometry), geometry[6]), _grids(steps, points)
        exact = exact or not conv_kernel_is_exact()
        call = known[key] = prepared_conv(unpacked_weight(weight, form), scales, bias, shape, grids, x.shape, exact)
    # An op that a compiler may move or repeat must not write over its arguments.
    return call(x, None if addend is None else addend.clone(memory_format=torch.channels_last))


def _pairs(geometry: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    return (geometry[0], geometry[1]), (geometry[2], geometry[3]), (geometry[4], geometry[5])


def _grids(steps: Sequence[float], points: Sequence[int]) -> ConvGrids:
    source = ByteGrid(steps[0], points[0], 0, UINT8_MAX)
    out = ByteGrid(steps[1], points[1], points[2], points[3]) if steps[1] else None
    return ConvGrids(source, out, ByteGrid(steps[2], points[4], 0, UINT8_MAX) if steps[2] else None)


def _conv2d_fake(
    x: Tensor,
    addend: Tensor | None,
    weight: Tensor,
    form: list[int],
    scales: Tensor,
    bias: Tensor | None,
    steps: list[float],
    points: list[int],
    geometry: list[int],
    exact: bool,
) -> Tensor:
    del addend, weight, scales, bias, points, exact
    stride, padding, dilation = _pairs(geometry)
    outputs, *_, rows, columns = form[1:5]
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (taps - 1) - 1) // stride[i] + 1
        for i, taps in enumerate((rows, columns))
    ]
    dtype = torch.uint8 if steps[1] else torch.float32
    shape = (x.shape[0], outputs, *sizes)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


torch.library.register_fake("fxquant::conv2d_u8", _conv2d_fake)


def conv2d_op(
    x: Tensor,
    weight: Tensor,
    form: Sequence[int],
    scales: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    grids: ConvGrids,
    other: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """Return `conv2d` through `torch.ops.fxquant.conv2d_u8`, which tracing compilers keep as one call."""
    source, out, addend = grids.source, grids.out, grids.addend
    written = out or source
    steps = [source.scale, out.scale if out else 0.0, addend.scale if addend else 0.0]
    points = [source.zero_point, written.zero_point, written.low, written.high, addend.zero_point if addend else 0]
    sizes = [*(number for size in geometry.sizes for number in size), geometry.groups]
    made: Tensor = torch.ops.fxquant.conv2d_u8(x, other, weight, form, scales, bias, steps, points, sizes, exact)
    return made


torch.library.define("fxquant::matmul_u8", "(Tensor x, Tensor weight, int[] form, bool exact) -> Tensor")

_WHOLE: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
"""Packed weight -> the int8 weight; an entry lives as long as the packed one."""


@torch.library.impl("fxquant::matmul_u8", "CPU")
def _matmul_op(x: Tensor, weight: Tensor, form: list[int], exact: bool) -> Tensor:
    whole = _WHOLE.get(weight)
    if whole is None:
        whole = _WHOLE[weight] = unpacked_weight(weight, form)
    return matmul(x, whole, exact or not matmul_kernel_is_exact()).to(torch.float64 if exact else torch.int32)


def _matmul_fake(x: Tensor, weight: Tensor, form: list[int], exact: bool) -> Tensor:
    del weight
    return torch.empty(x.shape[0], form[1], dtype=torch.float64 if exact else torch.int32, device=x.device)


torch.library.register_fake("fxquant::matmul_u8", _matmul_fake)


def matmul_op(x: Tensor, weight: Tensor, form: Sequence[int], exact: bool = False) -> Tensor:
    """Return `matmul` of uint8 and a packed weight as one call, int32 or float64."""
    made: Tensor = torch.ops.fxquant.matmul_u8(x, weight, form, exact)
    return made


torch.library.define("fxquant::unpack_i8", "(Tensor weight, int[] form) -> Tensor")


@torch.library.impl("fxquant::unpack_i8", "CPU")
def _unpack_op(weight: Tensor, form: list[int]) -> Tensor:
    # An answer must not share memory with an argument.
    return unpacked_weight(weight, form).clone()


def _unpack_fake(weight: Tensor, form: list[int]) -> Tensor:
    return torch.empty(form[1 : 1 + form[0]], dtype=torch.int8, device=weight.device)


torch.library.register_fake("fxquant::unpack_i8", _unpack_fake)


def unpack_op(weight: Tensor, form: Sequence[int]) -> Tensor:
    """Return the int8 weight that was packed, as one call."""
    made: Tensor = torch.ops.fxquant.unpack_i8(weight, form)
    return made


torch.library.define("fxquant::pad_u8", "(Tensor x, int[] pads, int value) -> Tensor")
torch.library.impl("fxquant::pad_u8", "CPU")(pad_u8)


def _pad_fake(x: Tensor, pads: Sequence[int], value: int) -> Tensor:
    del value
    shape = (*x.shape[:2], x.shape[2] + pads[2] + pads[3], x.shape[3] + pads[0] + pads[1])
    return torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)


torch.library.register_fake("fxquant::pad_u8", _pad_fake)


def pad_op(x: Tensor, pads: Sequence[int], value: int) -> Tensor:
    """Return `pad_u8` as one call: a compiler would write the padding into every loop that reads the image."""
    made: Tensor = torch.ops.fxquant.pad_u8(x, list(pads), value)
    return made
