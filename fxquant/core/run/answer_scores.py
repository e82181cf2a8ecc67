"""The scores that a model's own softmax or sigmoid reads, behind whatever only moves its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import functional as F

from fxquant.core.ir import FakeQuantize, clip_bounds, counts_images, shape_of, traced_images
from fxquant.core.run.discrete_answers import is_float, op_name

MOVES = frozenset(
    (
        *("alias", "chunk", "clone", "contiguous", "detach", "expand", "flatten", "flip", "getitem", "movedim"),
        *("narrow", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "swapaxes", "t"),
        *("transpose", "unbind", "unflatten", "unsafe_split", "unsqueeze", "view", "_unsafe_view"),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "upsample_nearest1d", "upsample_nearest2d"),
    )
)
"""Ops that show values in other places or shapes, or fewer or more often, by the name of their packet."""
SOFTMAX: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(("softmax", "_softmax"), torch.softmax),
    **dict.fromkeys(("log_softmax", "_log_softmax"), torch.log_softmax),
}
SIGMOID: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "log_sigmoid": F.logsigmoid}
VIEWS, CAST, CLAMP = ("view", "_unsafe_view"), ("_to_copy", "to"), ("clamp", "clip")
UNCLIPPED = (0.05, 0.95)
"""A clamp that leaves these probabilities alone only guards logarithms."""


@dataclass(frozen=True)
class Scores:
    """What a softmax or sigmoid reads whose results a model returns.

    Args:
        node: the scores.
        moves: what is done to them so that they lie as the results do, in order.
        place: the node of the graph whose axes the moved scores have.
        classes: the axis of the moved scores that the softmax goes along, None for a sigmoid.
        op: name of the softmax or sigmoid.
        behind: casts and clamps, and moves that take the classes apart.
    """

    node: Node
    moves: tuple[Node, ...]
    place: Node
    classes: int | None
    op: str
    behind: tuple[Callable[[Any], Any], ...]

    def shown(self, moved: Tensor, classes: int | None) -> Tensor:
        """Return what the model returns for moved scores, with images along axis 0 and classes along `classes`."""
        value = SIGMOID[self.op](moved) if classes is None else SOFTMAX[self.op](moved, dim=classes)
        for step in self.behind:
            value = step(value)
        return value


def scores_behind(value: Node) -> Scores | None:
    """Return the scores that a value shows the softmax or sigmoid of, None if it does not.

    Moves, casts and clamps in between are repeated on the scores or on what is shown of them. Moves that take the
    classes apart, as the choice of one probability does, are only shown: all classes are compared.
    """
    *behind, squash = _shown_by(value)
    behind.reverse()
    op, source = op_name(squash), squash.args[0] if squash.args else None
    if op not in (*SOFTMAX, *SIGMOID) or not isinstance(source, Node):
        return None
    moves = [node for node in behind if op_name(node) in MOVES]
    later = [each for node in behind if op_name(node) not in MOVES for each in _pointwise(node)]
    if op in SIGMOID:
        return Scores(source, (*moves,), value, None, op, (*later,))
    axes = axis_behind(source, int(str(squash.args[1])) % len(shape_of(source)), moves)
    kept = len(axes) - 1
    # A list of parts is no value that could be compared.
    while kept and not isinstance(moves[kept - 1].meta["val"], Tensor):
        kept -= 1
    rest = [partial(replayed, node) for node in moves[kept:]]
    place = moves[kept - 1] if kept else squash
    if rest and not (images_first(place) and images_first(value) and all(map(repeats, moves[kept:]))):
        return None
    return Scores(source, (*moves[:kept],), place, axes[kept], op, (*later, *rest))


def readers(value: Node) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    """Yield every op that reads a value, with what moves the value in front of it, in order."""
    waiting: list[tuple[Node, tuple[Node, ...]]] = [(value, ())]
    while waiting:
        node, moves = waiting.pop(0)
        for user in node.users:
            if op_name(user) in MOVES and user.args[0] is node:
                waiting.append((user, (*moves, user)))
            elif _is_quantizer(user):
                waiting.append((user, moves))
            else:
                yield user, moves


def move_of(node: Node) -> Callable[..., Any]:
    """Return the function of a move; a view becomes a reshape, for other values lie otherwise in memory."""
    assert callable(node.target)
    return torch.reshape if op_name(node) in VIEWS else node.target


def shown_by(value: Node) -> list[Node]:
    """Return a value and what it shows in other places, nearest first; quantizers in between are left out."""
    found = [value]
    while op_name(value) in MOVES or _is_quantizer(value):
        source = value.args[0]
        if not isinstance(source, Node):
            break
        value = source
        found += [] if _is_quantizer(value) else [value]
    return found


def axis_in_front(value: Node, moves: Sequence[Node], axis: int) -> int | None:
    """Return the axis of a value that becomes `axis`, and nothing else, once it is moved; None without one."""
    shown = moves[-1] if moves else value
    wanted = axis % max(1, len(shape_of(shown)))
    every = range(len(shape_of(value)))
    found = ((k, axis_behind(value, k, moves)) for k in every)
    return next((k for k, axes in found if len(axes) == len(moves) + 1 and axes[-1] == wanted), None)


def _shown_by(value: Node) -> Iterator[Node]:
    """Yield a value and what it shows, nearest first, down to what computes it."""
    while True:
        if not _is_quantizer(value):
            yield value
        name = op_name(value)
        source = value.args[0] if value.args else None
        passes = name in MOVES or _is_quantizer(value) or bool(_pointwise(value))
        if value.op not in ("call_function", "call_module") or not passes or not isinstance(source, Node):
            return
        value = source


def _pointwise(node: Node) -> list[Callable[[Tensor], Tensor]]:
    """Return what a cast or a clamp does to results, nothing where it is neither or clips more than the ends."""
    if op_name(node) in CAST and is_float(node.meta.get("val")):
        return [partial(_cast, node.meta["val"].dtype)]
    if op_name(node) not in CLAMP or len(node.all_input_nodes) != 1:
        return []
    low, high = clip_bounds(node)
    return [partial(torch.clamp, min=low, max=high)] if low <= UNCLIPPED[0] and high >= UNCLIPPED[1] else []


def _cast(kind: torch.dtype, value: Tensor) -> Tensor:
    return value.to(kind)


def _is_quantizer(node: Node) -> bool:
    owner = node.graph.owning_module
    if node.op != "call_module" or not isinstance(owner, GraphModule):
        return False
    return isinstance(owner.get_submodule(str(node.target)), FakeQuantize)


def axis_behind(source: Node, axis: int, moves: Sequence[Node]) -> list[int]:
    """Return where an axis is after each of the moves, itself first; shorter where a move merges or takes part of it.

    A value that counts along the axis is moved: the axis is where it still counts.
    """
    shape, found = shape_of(source), [axis]
    count = shape[axis]
    numbers = torch.arange(count, dtype=torch.float32)
    value: Any = numbers.reshape([count if k == axis else 1 for k in range(len(shape))]).expand(shape)
    images = traced_images(source.graph)
    for move in moves:
        value = replayed(move, value, images)
        if not isinstance(value, Tensor):
            found.append(found[-1])
            continue
        ends = [k for k, size in enumerate(value.shape) if size == count and _counts(value, k, numbers)]
        if len(ends) != 1:
            return found
        found += ends
    return found


def _counts(value: Tensor, axis: int, numbers: Tensor) -> bool:
    return bool((value.movedim(axis, -1) == numbers).all())


def images_first(node: Node) -> bool:
    """Whether axis 0 counts images and nothing else."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.dim() or not counts_images(value.shape[0], node.graph):
        return False
    return shape_of(node)[0] == traced_images(node.graph)


def repeats(move: Node) -> bool:
    """Whether a move can be repeated for any number of images: its sizes are numbers, or count images."""
    sizes = [size.meta["val"] for size in move.all_input_nodes[1:]]
    return all(isinstance(s, int) or counts_images(s, move.graph) for s in sizes)


def replayed(move: Node, value: Any, images: int | None = None) -> Any:
    """Move another value, which holds `images`, or as many as its axis 0 counts."""
    count = len(value) if images is None else images
    rest: Any = map_arg(move.args[1:], lambda size: _size(size, move.graph, count))
    return move_of(move)(value, *rest, **move.kwargs)


def _size(node: Node, graph: Graph, images: int) -> Any:
    size = node.meta["val"]
    hint = size if isinstance(size, int) else int(size.node.hint)
    return hint // traced_images(graph) * images if not isinstance(size, int) and counts_images(size, graph) else hint
