"""Outputs that a model joins to one: boxes, objectness and class scores of a detector, one behind the other.

Each part is compared by the loss that fits it. What a model returns of its parts is made again for functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.core.ir import shape_of
from fxquant.core.run.answer_scores import axis_behind, images_first, repeats, replayed, scores_behind, shown_by
from fxquant.core.run.discrete_answers import op_name

BOX = 4
"""Numbers of a box."""


@dataclass(frozen=True)
class Joined:
    """An output that is a concatenation.

    Args:
        value: what the model returns.
        parts: what it is made of, in order; images along axis 0 of each.
    """

    value: Node
    parts: tuple[Node, ...]

    def rebuilt(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the output for other values of the parts, any number of images."""
        return _rebuilt(self.value, iter(parts))


def joined(value: Node) -> Joined | None:
    """Return the parts of an output, None where it is compared as a whole.

    Its parts are known where one of them shows a softmax or sigmoid, or where, of (images, positions, numbers),
    one part are boxes of four numbers beside others.
    """
    parts = tuple(_parts(value))
    if len(parts) < 2 or not images_first(value):
        return None
    boxes = len(shape_of(value)) == 3 and _boxes_axis(value) == 2
    return Joined(value, parts) if boxes or any(scores_behind(part) is not None for part in parts) else None


def _concatenation(value: Node) -> tuple[list[Node], int, list[Node]] | None:
    """Return what a value joins, along which axis, and how it is moved behind; None if it joins nothing."""
    *moves, source = shown_by(value)
    if op_name(source) != "cat" or not isinstance(source.args[0], list | tuple):
        return None
    given = [each for each in source.args[0] if isinstance(each, Node)]
    axis = source.args[1] if len(source.args) > 1 else 0
    assert isinstance(axis, int)
    axis %= len(shape_of(source))
    fits = axis > 0 and all(map(images_first, (source, *given))) and all(map(repeats, moves))
    return (given, axis, moves[::-1]) if fits and len(given) == len(source.args[0]) else None


def _parts(value: Node) -> Iterator[Node]:
    found = _concatenation(value)
    if found is None:
        yield value
        return
    for each in found[0]:
        yield from _parts(each)


def _boxes_axis(value: Node) -> int | None:
    """Return the axis of a value along which the innermost concatenation joins four numbers and more than one other."""
    found = _concatenation(value)
    if found is None:
        return None
    given, axis, moves = found
    widths = [shape_of(each)[axis] for each in given]
    inner = _boxes_axis(given[0])
    if inner is None and not (BOX in widths and any(width not in (1, BOX) for width in widths)):
        return None
    axes = axis_behind(shown_by(value)[-1], axis if inner is None else inner, moves)
    return axes[-1] if len(axes) == len(moves) + 1 else None


def _rebuilt(value: Node, parts: Iterator[Tensor]) -> Tensor:
    found = _concatenation(value)
    if found is None:
        return next(parts)
    given, axis, moves = found
    made = torch.cat([_rebuilt(each, parts) for each in given], axis)
    for move in moves:
        made = replayed(move, made)
    return made
