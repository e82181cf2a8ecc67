"""How ATen ops that pool, move or rearrange values are written in ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fxquant.backends.onnx.emitters import EMITTERS, emits
from fxquant.backends.onnx.lowering import Lowering, dims, static_shape
from fxquant.backends.onnx.rewrites import spread
from fxquant.backends.onnx.size_arithmetic import size_value, size_vector
from fxquant.backends.onnx.stem import BLOCK, space_to_depth
from fxquant.core.ir import arguments

aten = torch.ops.aten

__all__ = ["EMITTERS"]

PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@emits(aten.max_pool1d.default, aten.max_pool2d.default, aten.avg_pool1d.default, aten.avg_pool2d.default)
def _pool(lowering: Lowering, node: Node) -> str | None:
    given = arguments(node)
    axes = 1 if "1d" in str(node.target) else 2
    kernel, padding = spread(given["kernel_size"], axes), spread(given["padding"], axes)
    stride = spread(given["stride"], axes) if given["stride"] else kernel
    dilation = spread(given.get("dilation", 1), axes)
    if len(dims(node.args[0])) != axes + 2:
        return None
    before, after = static_shape(node.args[0])[2:], static_shape(node)[2:]
    ends = list(padding)
    if given["ceil_mode"]:
        if -1 in before:
            return None
        # Runtimes count windows that hang over the end otherwise than torch; padding says where each of them lies.
        reach = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in zip(after, stride, dilation, kernel, strict=True)]
        ends = [max(p, r - p - size) for p, r, size in zip(padding, reach, before, strict=True)]
    x = [lowering.value(node.args[0])]
    if any(e >= k for e, k in zip(ends, kernel, strict=True)):
        # Runtimes take less padding than a kernel; only dilated windows, of the maximum, reach out further.
        widths = [width for pair in zip(reversed(padding), reversed(ends), strict=True) for width in pair]
        lowest = lowering.number(float(np.finfo(np.float32).min))
        pads = lowering.integers(lowering.pads(node, widths))
        x = [lowering.write(node, "Pad", [*x, pads, lowest], mode="constant")]
        padding = ends = [0] * axes
    shape: dict[str, Any] = {"kernel_shape": kernel, "strides": stride, "pads": padding + ends}
    if node.target in (aten.max_pool1d.default, aten.max_pool2d.default):
        return lowering.write(node, "MaxPool", x, **shape, dilations=dilation)
    divisor, counted = given.get("divisor_override"), given["count_include_pad"]
    if divisor is None and (ends == padding or not counted):
        return lowering.write(node, "AveragePool", x, **shape, count_include_pad=int(counted))
    pooled = lowering.write(node, "AveragePool", x, **shape, count_include_pad=1)
    whole = float(np.prod(kernel))
    if divisor is not None:
        return lowering.write(node, "Mul", [pooled, lowering.number(whole / divisor)])
    # Torch divides by what of a window lies within image and padding, not by what hangs over.
    inside = [
        np.array([min(o * s + k, size + 2 * p) - o * s for o in range(count)], np.float32)
        for count, s, k, size, p in zip(after, stride, kernel, before, padding, strict=True)
    ]
    share = whole / (inside[0] if axes == 1 else np.outer(*inside))
    factor = lowering.constant(share[None, None].astype(np.float32), f"{node.name}_share")
    return lowering.write(node, "Mul", [pooled, factor])


ADAPTIVE: dict[Any, int] = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}
"""Adaptive mean -> the axes that it goes along."""


@emits(*ADAPTIVE)
def _adaptive_pool(lowering: Lowering, node: Node) -> str | None:
    axes = ADAPTIVE[node.target]
    if _all_of(node, axes) and len(dims(node.args[0])) == 4:
        return lowering.write(node, "GlobalAveragePool", [lowering.value(node.args[0])])
    # Of images of one size, the exporter knows the windows.
    free = axes == 3 or -1 in static_shape(node.args[0])[-axes:]
    return _windows(lowering, node, "ReduceMean", axes) if free else None


def _all_of(node: Node, axes: int) -> bool:
    sizes = node.args[1]
    return axes == 2 and isinstance(sizes, list | tuple) and [*sizes, *sizes][:2] == [1, 1]


@emits(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default)
def _adaptive_max_pool(lowering: Lowering, node: Node) -> str | None:
    # Which pixel won has no form here.
    if any(user.args[1] != 0 for user in node.users):
        return None
    return _windows(lowering, node, "ReduceMax", 1 if "1d" in str(node.target) else 2)


def _windows(lowering: Lowering, node: Node, reduce: str, axes: int) -> str | None:
    """Write an adaptive pooling, axis by axis: window k of n reaches from `k s // n` to `-(-(k + 1) s // n)`.

    Windows are rectangles, so the mean of a window is the mean of its rows' means, and their maximum likewise.
    """
    source, wanted = node.args[:2]
    assert isinstance(wanted, list | tuple)
    size, rank = dims(source), len(dims(source))
    x = lowering.value(source)
    for axis, count in zip(range(rank - axes, rank), [*wanted, *wanted, *wanted][:axes], strict=True):
        if not isinstance(count, int):
            # Asked for as many windows as there are pixels, the axis stays as it is.
            if count.meta["val"] != size[axis]:
                return None
            continue
        place, parts = lowering.integers([axis]), []
        ends = _ends(lowering, node, source, axis, count)
        for k in range(count):
            cut = lowering.write(node, "Slice", [x, *(end[k] for end in ends), place]) if count > 1 else x
            parts.append(lowering.write(node, reduce, [cut, place]))
        x = lowering.write(node, "Concat", parts, axis=axis) if count > 1 else parts[0]
    return x


@emits(aten.upsample_bicubic2d.vec)
def _bicubic(lowering: Lowering, node: Node) -> str | None:
    """Write a bicubic interpolation to fewer pixels image by image and channel by channel.

    ONNX Runtime moves channels to the end around its integer layers, and refuses to shrink images of that layout. It
    does not move them through a reshape. All other interpolations are the exporter's.
    """
    given, before, after = arguments(node), static_shape(node.args[0])[1:], static_shape(node)[2:]
    if -1 in before or len(before) != 3 or all(a >= b for a, b in zip(after, before[1:], strict=True)):
        return None
    factors = given["scale_factors"] or [a / b for a, b in zip(after, before[1:], strict=True)]
    sizes = [int(np.floor(np.float32(b) * np.float32(f))) for b, f in zip(before[1:], factors, strict=True)]
    if sizes != list(after):
        return None
    apart = lowering.write(node, "Reshape", [lowering.value(node.args[0]), lowering.integers([-1, 1, *before[1:]])])
    scales = lowering.constant(np.array([1, 1, *factors], np.float32), f"{node.name}_scales")
    mode = "align_corners" if given["align_corners"] else "half_pixel"
    form: dict[str, Any] = {"mode": "cubic", "coordinate_transformation_mode": mode, "cubic_coeff_a": -0.75}
    made = lowering.write(node, "Resize", [apart, "", scales], **form)
    return lowering.write(node, "Reshape", [made, lowering.integers([-1, before[0], *after])])


def _ends(lowering: Lowering, node: Node, source: Any, axis: int, count: int) -> tuple[list[str], list[str]]:
    """Return where the windows of an axis begin and end, each an int64 vector of length 1."""
    size = static_shape(source)[axis]
    if size != -1:
        begins, stops = ([k * size // count for k in range(count)], [-(-(k + 1) * size // count) for k in range(count)])
        return [lowering.integers([k]) for k in begins], [lowering.integers([k]) for k in stops]
    free = lowering.write(node, "Shape", [lowering.value(source)], start=axis, end=axis + 1)
    whole = lowering.integers([count])

    def times(factor: int, more: int) -> str:
        product = lowering.write(node, "Mul", [free, lowering.integers([factor])])
        raised = lowering.write(node, "Add", [product, lowering.integers([more])]) if more else product
        return lowering.write(node, "Div", [raised, whole])

    return [times(k, 0) for k in range(count)], [times(k + 1, count - 1) for k in range(count)]


@emits(aten.mean.dim)
def _mean(lowering: Lowering, node: Node) -> str | None:
    given = arguments(node)
    rank = len(dims(node.args[0]))
    if given["dtype"] is not None or not given["dim"]:
        return None
    axes = sorted(axis % rank for axis in given["dim"])
    x = lowering.value(node.args[0])
    # ReduceMean has no integer kernel, its special case has.
    if rank == 4 and axes == [2, 3] and given["keepdim"]:
        return lowering.write(node, "GlobalAveragePool", [x])
    return lowering.write(node, "ReduceMean", [x, lowering.integers(axes)], keepdims=int(given["keepdim"]))


@emits(space_to_depth)
def _space_to_depth(lowering: Lowering, node: Node) -> str | None:
    return lowering.write(node, "SpaceToDepth", [lowering.value(node.args[0])], blocksize=BLOCK)


@emits(aten.pixel_shuffle.default)
def _pixel_shuffle(lowering: Lowering, node: Node) -> str | None:
    if len(dims(node)) != 4:
        return None
    x, block = node.args
    return lowering.write(node, "DepthToSpace", [lowering.value(x)], blocksize=block, mode="CRD")


@emits(aten.pad.default, aten.constant_pad_nd.default)
def _pad(lowering: Lowering, node: Node) -> str | None:
    given = arguments(node)
    mode = PAD_MODES.get(given.get("mode", "constant"))
    pads = size_vector(lowering, lowering.pads(node, given["pad"]))
    if mode is None or pads is None or node.meta["val"].dtype != torch.float32:
        return None
    inputs = [lowering.value(node.args[0]), pads]
    if mode == "constant":
        inputs.append(lowering.number(given.get("value") or 0.0))
    return lowering.write(node, "Pad", inputs, mode=mode)


@emits(aten.cat.default)
def _cat(lowering: Lowering, node: Node) -> str | None:
    given = arguments(node)
    if any(part.meta["val"].dtype != node.meta["val"].dtype for part in given["tensors"]):
        return None
    return lowering.write(node, "Concat", [lowering.value(part) for part in given["tensors"]], axis=given["dim"])


@emits(aten.slice.Tensor)
def _slice(lowering: Lowering, node: Node) -> str | None:
    given = arguments(node)
    start, end = given["start"] or 0, 2**63 - 1 if given["end"] is None else given["end"]
    parts = [size_vector(lowering, [part]) for part in (start, end, given["dim"], given["step"])]
    if None in parts:
        return None
    return lowering.write(node, "Slice", [lowering.value(node.args[0]), *filter(None, parts)])


@emits(aten.split.Tensor)
def _split(lowering: Lowering, node: Node) -> tuple[str, ...] | None:
    """Write pieces of one size, the last one possibly smaller, as slices; others are written as their sizes are."""
    given, count = arguments(node), len(node.meta["val"])
    size = size_value(lowering, given["split_size"])
    if size is None or isinstance(given["split_size"], int):
        return None
    axes = lowering.integers([given["dim"]])
    ends = [lowering.builder.node("Mul", [size, lowering.integers([k])], f"{node.name}_end") for k in range(count + 1)]
    x = lowering.value(node.args[0])
    return tuple(lowering.write(node, "Slice", [x, ends[k], ends[k + 1], axes]) for k in range(count))


@emits(aten.select.int)
def _select(lowering: Lowering, node: Node) -> str | None:
    given = arguments(node)
    if not isinstance(given["index"], int):
        return None
    index = lowering.constant(np.array(given["index"], np.int64), f"i{given['index']}")
    return lowering.write(node, "Gather", [lowering.value(node.args[0]), index], axis=given["dim"])


@emits(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
def _reshape(lowering: Lowering, node: Node) -> str | None:
    shape = static_shape(node)
    # -1 means one unknown size; an empty tensor would make it ambiguous.
    if 0 in shape:
        return None
    sizes = lowering.integers(shape)
    if shape.count(-1) > 1:
        given = arguments(node).get("size", arguments(node).get("shape"))
        found = size_vector(lowering, given) if isinstance(given, list | tuple) else None
        if found is None:
            return None
        sizes = found
    return lowering.write(node, "Reshape", [lowering.value(node.args[0]), sizes])


@emits(aten.permute.default)
def _permute(lowering: Lowering, node: Node) -> str | None:
    rank = len(dims(node))
    order = node.args[1]
    assert isinstance(order, list | tuple)
    return lowering.write(node, "Transpose", [lowering.value(node.args[0])], perm=[int(str(a)) % rank for a in order])


@emits(aten.transpose.int, aten.t.default)
def _transpose(lowering: Lowering, node: Node) -> str | None:
    rank = len(dims(node))
    order = list(range(rank))
    if node.target is aten.t.default:
        order.reverse()
    else:
        one, other = (int(str(axis)) % rank for axis in node.args[1:3])
        order[one], order[other] = other, one
    return lowering.write(node, "Transpose", [lowering.value(node.args[0])], perm=order)


@emits(aten.expand.default)
def _expand(lowering: Lowering, node: Node) -> str | None:
    sizes = node.args[1]
    assert isinstance(sizes, list | tuple)
    # Expand reads a size of 1 as "keep", as torch reads -1.
    shape = size_vector(lowering, [1 if size == -1 else size for size in sizes])
    return None if shape is None else lowering.write(node, "Expand", [lowering.value(node.args[0]), shape])
