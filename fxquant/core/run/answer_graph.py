"""The value of a graph that losses compare: floating-point, one entry for each image along axis 0.

Models return class numbers, masks, images of bytes, or arrays in which axis 0 counts time steps. Losses and their
derivatives need the last floating-point values in front of those, image by image.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.node import map_arg
from torch.utils._pytree import tree_structure

from fxquant.core.errors import CaptureError
from fxquant.core.ir import (
    ScaleRule,
    counts_images,
    finish,
    fork,
    is_constant,
    nodes_by_name,
    rule_of,
    shape_of,
    trace_line,
    traced_images,
)
from fxquant.core.run.answer_scores import (
    SIGMOID,
    SOFTMAX,
    Scores,
    axis_in_front,
    move_of,
    readers,
    scores_behind,
    shown_by,
)
from fxquant.core.run.discrete_answers import is_float, op_name
from fxquant.core.run.joined_outputs import Joined, joined
from fxquant.core.run.smooth_values import smooth_values

FLOATS_ONLY = (
    "the model returns {kinds} and no floating-point value that depends on its layers, so there is nothing to compare "
    "a quantized answer with; return class scores, or what the integers are made of, too"
)
LOGITS = "logits"
"""Entry of a dictionary that is the answer; `fxquant.capture` puts it first."""
BEHIND, OTHER = "{line!r} ({name}), the last floats in front of the model's answer", "output {index} of the model"


@dataclass(frozen=True)
class Answer:
    """What losses compare.

    Args:
        node: its value, or what has the axes of the moved scores that are compared instead.
        axis: the axis that counts images.
        rows: how many entries of that axis belong to one image: 1, or more where axes were merged.
        images_first: whether an image's entries follow each other; else image 0 comes again after the last one.
        note: what is said where this is not the model's first output, else "".
        classes: the axis that a softmax or the choice of a class goes along, None where there is none.
        independent: whether it goes through a sigmoid.
        scores: those that the model's softmax or sigmoid makes its output of, None where the value is the output.
        joined: the output that it is a part of, None where it is not one of several.

    Raises:
        CaptureError: no axis counts images.
    """

    node: Node
    axis: int
    rows: int = 1
    images_first: bool = True
    note: str = ""
    classes: int | None = None
    independent: bool = False
    scores: Scores | None = None
    joined: Joined | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.axis < len(shape_of(self.node)):
            raise CaptureError(
                f"{self.node.name!r} has shape {shape_of(self.node)}, in which no axis counts images; "
                "return one answer for each image"
            )


def find_answers(graph: Graph) -> list[Answer]:
    """Return what losses compare of each output, in order; nothing where the graph has no traced values.

    An output that is floating-point, can be differentiated and has an axis of images is compared itself, any other by
    the last value of that kind in front of it. The first of the former comes first, or else the first of the latter.
    A dictionary's entry `logits` is compared alone, and of class probabilities the values that they are made of.

    Raises:
        CaptureError: there is none.
    """
    outputs = list(dict.fromkeys(graph.output_node().all_input_nodes))
    if any("val" not in node.meta for node in outputs):
        return []
    outputs = [node for node in outputs if isinstance(node.meta["val"], Tensor)]
    smooth, found = smooth_values(graph), dict[tuple[Node, ...], Answer]()
    if _first_is_logits(graph) and _usable(outputs[0], smooth):
        outputs = outputs[:1]
    for node in sorted(outputs, key=lambda node: not _usable(node, smooth)):
        value = next((source for source in _backwards([node]) if _usable(source, smooth)), None)
        # What class numbers are chosen from may be shown in another order by an output.
        known = [value] if value is node or value is None else shown_by(value)
        if value is not None and not any((each,) in found for each in known):
            note = "" if value is outputs[0] else OTHER if value is node else BEHIND
            said = note.format(line=trace_line(value), name=value.name, index=outputs.index(node))
            whole = joined(value)
            parts = {key: made for part in (whole.parts if whole else ()) for key, made in _compared(part, smooth)}
            if whole is None or len(parts) < len(whole.parts) or not parts.keys().isdisjoint(found):
                whole, parts = None, dict(_compared(value, smooth))
            for key, (place, scores) in parts.items():
                found.setdefault(key, _answer(place, said, scores, whole))
    if not found:
        # Says which shape has no axis of images.
        left = [Answer(node, -1) for node in outputs if node in smooth]
        assert not left
        kinds = ", ".join(dict.fromkeys(str(node.meta["val"].dtype).removeprefix("torch.") for node in outputs))
        raise CaptureError(FLOATS_ONLY.format(kinds=kinds))
    return list(found.values())


def _compared(value: Node, smooth: set[Node]) -> Iterator[tuple[tuple[Node, ...], tuple[Node, Scores | None]]]:
    """Yield the nodes that tell a value from others, with what has its axes and the scores that it shows, if any."""
    scores = scores_behind(value)
    if scores is not None and _usable(scores.node, smooth):
        yield (scores.node, *scores.moves), (scores.place, scores)
    elif _usable(value, smooth):
        yield (value,), (value, None)


def answer_graph(module: GraphModule) -> GraphModule:
    """Return a graph whose output is what losses compare, shape (images, ...); the graph itself where it is that.

    Several rows per image become the last axis, so that classes stay on axis 1. Several outputs become one row of
    values for each image.

    Args:
        module: a float or simulated graph; it is not changed, parameters are shared.

    Raises:
        CaptureError: it returns nothing that losses can compare.
    """
    return _returning(module, _joined)


def answer_parts(module: GraphModule) -> GraphModule:
    """Return a graph whose outputs are what losses compare, each of shape (images, ...), before they are joined.

    Args:
        module: as for `answer_graph`.

    Raises:
        CaptureError: it returns nothing that losses can compare.
    """
    return _returning(module, tuple)


def _returning(module: GraphModule, made_of: Callable[[list[Node]], tuple[Node, ...]]) -> GraphModule:
    answers = find_answers(module.graph)
    outputs = [node for node in module.graph.output_node().all_input_nodes if isinstance(node.meta.get("val"), Tensor)]
    plain = all(answer.axis == 0 and answer.rows == 1 for answer in answers) and len(answers) == 1
    if not answers or (plain and answers[0].scores is None and answers[0].node is outputs[0]):
        return module
    made = fork(module)
    known, output = nodes_by_name(made.graph), made.graph.output_node()
    with made.graph.inserting_before(output):
        values = made_of([_by_image(_moved(answer, known), answer) for answer in answers])
    output.args = (values,)
    codegen = made.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        # Called as before; the answer is a tuple now, whatever structure the model's own has.
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=tree_structure((0,) * len(values)))
    return finish(made)


def _joined(values: list[Node]) -> tuple[Node, ...]:
    if len(values) == 1:
        return (values[0],)
    rows = [_call(torch.flatten, v, 1) if len(shape_of(v)) > 1 else _call(torch.unsqueeze, v, 1) for v in values]
    joined = rows[0].graph.call_function(torch.cat, (rows, 1))
    joined.meta["val"] = torch.cat([row.meta["val"] for row in rows], 1)
    return (joined,)


def _usable(node: Node, smooth: set[Node]) -> bool:
    value = node.meta.get("val")
    return node in smooth and isinstance(value, Tensor) and is_float(value) and _images_at(node) is not None


def _moved(answer: Answer, known: dict[str, Node]) -> Node:
    """Return the value that is compared, in a graph with these nodes; scores are moved as the results are."""
    if answer.scores is None:
        return known[answer.node.name]
    value = known[answer.scores.node.name]
    for move in answer.scores.moves:
        rest: Any = map_arg(move.args[1:], lambda source: known[source.name])
        value = value.graph.call_function(move_of(move), (value, *rest), dict(move.kwargs))
        value.meta["val"] = move.meta["val"]
    return value


def _by_image(value: Node, answer: Answer) -> Node:
    """Append what brings images to axis 0 and the rows of an image to the end."""
    axis = answer.axis
    if answer.rows > 1:
        sizes = [-1, answer.rows] if answer.images_first else [answer.rows, -1]
        value = _call(torch.unflatten, value, axis, sizes)
        value = _call(torch.movedim, value, axis + answer.images_first, -1)
    return _call(torch.movedim, value, axis, 0) if axis else value


def _call(function: Any, value: Node, *args: Any) -> Node:
    node = value.graph.call_function(function, (value, *args))
    node.meta["val"] = function(value.meta["val"], *args)
    return node


def _answer(node: Node, note: str, scores: Scores | None, whole: Joined | None) -> Answer:
    axis = _images_at(node)
    assert axis is not None
    rows = max(1, shape_of(node)[axis] // traced_images(node.graph))
    found = [(op_name(user), user.args[1:2], moves) for user, moves in readers(node)]
    chosen = [
        axis_in_front(node, moves, axes[0])
        for op, axes, moves in found
        if op in (*SOFTMAX, "argmax") and axes and isinstance(axes[0], int)
    ]
    at = scores.classes if scores is not None else next((k for k in chosen if k is not None), None)
    # Images move to the front.
    classes = None if at is None or at == axis else at + (at < axis)
    images_first = rows == 1 or _images_vary_slowest(node, axis)
    sigmoid = classes is None and (scores is not None or any(op in SIGMOID for op, _, _ in found))
    return Answer(node, axis, rows, images_first, note, classes, sigmoid, scores, whole)


def _first_is_logits(graph: Graph) -> bool:
    codegen = graph._codegen
    spec = codegen.pytree_info.out_spec if isinstance(codegen, _PyTreeCodeGen) else None
    keys = getattr(spec, "context", None)
    return isinstance(keys, list | tuple) and keys[:1] in ([LOGITS], (LOGITS,))


def _images_at(node: Node) -> int | None:
    """Return the axis of a tensor that counts images, the first one that counts nothing else if there is one."""
    sizes = node.meta["val"].shape
    counting = [axis for axis, size in enumerate(sizes) if counts_images(size, node.graph)]
    images = traced_images(node.graph)
    alone = [axis for axis in counting if shape_of(node)[axis] == images]
    return next(iter(alone or counting), None)


def _images_vary_slowest(node: Node, axis: int) -> bool:
    """Whether the rows of an axis of images and something else begin with all of the first image.

    They do not where images follow each other along the second of two merged axes, or where batches are joined.
    """
    size = node.meta["val"].shape[axis]
    while True:
        sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor) and not is_constant(n)]
        same = [n for n in sources if n.meta["val"].dim() > axis and n.meta["val"].shape[axis] == size]
        if not same:
            break
        node = same[0]
    if not sources or _images_at(sources[0]) is None:
        return True
    rule = rule_of(node)
    if rule is not None and rule.scale is ScaleRule.SHARE:
        return False
    # Merged axes: the first of them has as many elements before it as the merged one.
    before, at = prod(shape_of(node)[:axis]), _images_at(sources[0])
    assert at is not None
    return prod(shape_of(sources[0])[:at]) == before


def _backwards(nodes: Iterable[Node]) -> Iterator[Node]:
    """Yield nodes and all that they are computed from, the nearest first."""
    waiting, seen = deque(nodes), set[Node]()
    while waiting:
        node = waiting.popleft()
        if node not in seen:
            seen.add(node)
            yield node
            waiting.extend(node.all_input_nodes)
