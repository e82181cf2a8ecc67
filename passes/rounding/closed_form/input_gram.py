"""Second moments of a weighted op's input, accumulated batch by batch: the statistics that GPTQ and GPFQ need.

The output of a linear layer or of one position of a convolution is `W x` with x the patch under the filter. Over all
images and positions, `sum |W x - Q x|^2 = tr((W - Q) H (W - Q)')` with `H = sum x x'`: K x K numbers per group of the
convolution replace every patch of every image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from fxquant.core.errors import PipelineError
from fxquant.core.ir import rule_of, shape_of
from fxquant.passes.formats import Patches

PIECE_ELEMENTS = 1 << 22
"""Patch elements laid out in memory at a time, 16 MB of float32."""
POSITIONS_PER_WEIGHT = 4
"""Positions of each image that are counted for each weight of a filter: neighbours say next to nothing new, and front
layers have thousands of them for nine weights."""
FEWEST_ROWS = 8
"""Rows of positions of each image that are counted where there are as many."""


@dataclass(frozen=True)
class Geometry:
    """How a weighted op slides over its input; a linear layer has no axes to slide along.

    Args:
        kernel: filter size along each spatial axis.
        stride: step along each.
        padding: zeros (in front, behind) along each.
        dilation: distance of filter taps along each.
        groups: groups of input channels, each with its own filters.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


def geometry_of(node: Node) -> Geometry:
    """Return the geometry of a convolution of any rank or a linear layer, read from its schema.

    Raises:
        PipelineError: the node has no weight.
    """
    rule = rule_of(node)
    if rule is None or rule.weight is None:
        raise PipelineError(f"node {node.name!r} has no weight, so it reads no patches")
    kernel = shape_of(node.args[rule.weight])[2:]
    stride, dilation = (_per_axis(_argument(node, name), len(kernel)) for name in ("stride", "dilation"))
    reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    padding = _argument(node, "padding")
    if padding == "same":
        # What does not halve goes behind, as torch has it.
        pads = [(total // 2, total - total // 2) for total in reach]
    elif padding == "valid":
        pads = [(0, 0) for _ in reach]
    else:
        pads = [(size, size) for size in _per_axis(padding, len(kernel))]
    return Geometry(tuple(kernel), stride, tuple(pads), dilation, int(_argument(node, "groups") or 1))


def channel_axis(dimensions: int, node: Node) -> int:
    """Return the axis of an input or output of a weighted op that counts channels.

    It precedes the axes the filter slides along, and is the last where there are none.

    Args:
        dimensions: axes of the input or output.
        node: the op.
    """
    rule = rule_of(node)
    assert rule is not None
    assert rule.weight is not None
    return dimensions - len(shape_of(node.args[rule.weight])) + 1


def _argument(node: Node, name: str) -> Any:
    assert isinstance(node.target, OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, argument.default_value)
    return None


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    sizes = [int(size) for size in value] if isinstance(value, list | tuple) else [int(value or 0)]
    return tuple(sizes * axes if len(sizes) == 1 else sizes)


def rows_apart(x: Tensor, geometry: Geometry) -> int:
    """Return how many rows of positions, along the first spatial axis, are counted as one: see `POSITIONS_PER_WEIGHT`.

    Args:
        x: input of the op.
        geometry: of the op.
    """
    if not geometry.kernel:
        return 1
    axes = len(geometry.kernel)
    slides = zip(x.shape[-axes:], geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    sizes = [(size + sum(pads) - gap * (taps - 1) - 1) // step + 1 for size, taps, step, pads, gap in slides]
    weights = x.shape[-axes - 1] // geometry.groups * prod(geometry.kernel)
    return max(1, min(sizes[0] // FEWEST_ROWS, prod(sizes) // (POSITIONS_PER_WEIGHT * weights)))


def some_rows(values: Tensor, axis: int, apart: int) -> Tensor:
    """Return one row of positions of so many, from the middle of the first ones on."""
    return values[(slice(None),) * axis + (slice(apart // 2, None, apart),)]


def patches(x: Tensor, geometry: Geometry, limit: int = PIECE_ELEMENTS, apart: int = 1) -> Iterator[Tensor]:
    """Yield the patches under the filters, piece by piece, each of shape (groups, positions, K), K = filter elements.

    Args:
        x: input of the op: (images, channels, ...) or (channels, ...) for a convolution, (..., features) for a linear
            layer.
        geometry: of the op.
        limit: elements of a piece; one row of positions of one image is the least.
        apart: rows of positions of which one is yielded.
    """
    if not geometry.kernel:
        rows = x.reshape(-1, x.shape[-1])
        for piece in torch.split(rows, max(1, limit // rows.shape[1])):
            yield piece.unsqueeze(0)
        return
    axes, groups = len(geometry.kernel), geometry.groups
    x = x if x.dim() == axes + 2 else x.unsqueeze(0)
    x = F.pad(x, [side for pair in reversed(geometry.padding) for side in pair])
    for axis, (size, step, gap) in enumerate(zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    # (images, positions..., channels, taps...): still a view of the padded input.
    x = some_rows(x.movedim(1, 1 + axes), 1, apart)
    row = max(1, x[0, 0].numel())
    images = max(1, limit // max(1, row * x.shape[1]))
    height = x.shape[1] if images > 1 else max(1, limit // row)
    for part in torch.split(x, images):
        for piece in torch.split(part, height, dim=1):
            yield piece.reshape(piece.shape[: 1 + axes].numel(), groups, -1).transpose(0, 1)


@dataclass(frozen=True)
class Moments:
    """Second moments of one op's patches.

    Args:
        gram: `H = sum x x'`, float64 of shape (groups, K, K), x as the quantized network has it.
        cross: `G = sum x f'`, of the same shape, f the float network's patches; H itself where both networks read the
            same.
    """

    gram: Tensor
    cross: Tensor


class GramAccumulator:
    """Adds up the moments of one or several ops that share a weight, batch by batch.

    Products are taken in the type of the values over at most `PIECE_ELEMENTS` of them, and added up in float64, so that
    round-off does not grow with the number of images.

    Args:
        crossed: whether the float network's patches come along.
        few: keep the patches themselves while they are at most half as many as a filter has weights.
    """

    def __init__(self, crossed: bool = False, few: bool = False) -> None:
        self._crossed = crossed
        self._kept: list[Tensor] | None = [] if few else None
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None

    def add(self, x: Tensor, geometry: Geometry, reference: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            x: input of the op.
            geometry: of the op.
            reference: the float network's input of the same shape, wanted if and only if `crossed`.

        Raises:
            PipelineError: the reference is missing, not wanted, or of another shape.
        """
        if (reference is not None) != self._crossed or (reference is not None and reference.shape != x.shape):
            raise PipelineError("cross moments need the float input beside the quantized one, of the same shape")
        apart = rows_apart(x, geometry)
        others = None if reference is None else patches(reference, geometry, apart=apart)
        for piece in patches(x, geometry, apart=apart):
            if self._keeps(piece):
                continue
            transposed = piece.transpose(1, 2)
            self._gram = _added(self._gram, transposed, piece)
            if others is not None:
                self._cross = _added(self._cross, transposed, next(others))

    def _keeps(self, piece: Tensor) -> bool:
        """Whether the patches are few with these, which are kept then; else those kept so far are counted."""
        if self._kept is None:
            return False
        self._kept.append(piece)
        if 2 * sum(each.shape[1] for each in self._kept) <= piece.shape[2]:
            return True
        for each in self._kept[:-1]:
            self._gram = _added(self._gram, each.transpose(1, 2), each)
        self._kept = None
        return False

    def gram(self) -> Tensor | Patches:
        """Return the second moments of all batches, as patches where there are few.

        Raises:
            PipelineError: no batch was added.
        """
        return Patches(torch.cat(self._kept, dim=1).double()) if self._kept else self.moments().gram

    def moments(self) -> Moments:
        """Return the moments of all batches.

        Raises:
            PipelineError: no batch was added.
        """
        if self._gram is None:
            raise PipelineError("no batch was counted; run images through the network first")
        gram = (self._gram + self._gram.transpose(1, 2)) / 2
        return Moments(gram, gram if self._cross is None else self._cross)


def _added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    wide = wide_product(left, right)
    return wide if total is None else total.add_(wide)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product in float64, taken in the type of the values where that can hold it."""
    wide = (left @ right).double()
    if not bool(torch.isfinite(wide).all()):
        # Squares of large values leave the range of float32, those of float64 do not.
        wide = left.double() @ right.double()
    return wide
