"""The loss that fits what a model returns: for each output one, by the signs its graph gives of what it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.fx import Graph, GraphModule

from fxquant.core.errors import OptionError
from fxquant.core.ir import shape_of
from fxquant.core.run.answer_graph import Answer, answer_parts, find_answers
from fxquant.core.run.discrete_answers import op_name
from fxquant.core.run.joined_outputs import BOX
from fxquant.core.run.losses import LOSSES, Loss, LossFunction
from fxquant.core.run.recurrent_states import is_state
from fxquant.core.run.replay import first_tensor
from fxquant.core.run.runner import placeholders
from fxquant.core.run.task_losses import JOIN, FunctionLoss, JointLoss, Part, loss_of

Shape = tuple[int, ...]
COLOURS = 3
"""An image of as many channels as its input, or of up to 3, is not one of classes."""


@dataclass(frozen=True)
class _Output:
    """One output, images along axis 0.

    Args:
        shape: of the output.
        answer: what the graph says of it; None where there is no graph.
        others: shapes of all outputs.
        images: shapes of the model's inputs that are images.
        words: rows of the tables that the model looks integers up in.
    """

    shape: Shape
    answer: Answer | None
    others: Sequence[Shape]
    images: Sequence[Shape]
    words: frozenset[int]


def _axis_chosen_along(output: _Output) -> int | None:
    return None if output.answer is None else output.answer.classes


def _axis_of_one_row(output: _Output) -> int | None:
    if output.answer is not None and output.answer.scores is None and is_state(output.answer.node):
        return None
    several = output.answer is not None and output.answer.rows > 1
    row = output.shape[:-1] if several else output.shape
    return 1 if len(row) == 2 and row[1] >= 2 else None


def _axis_of_words(output: _Output) -> int | None:
    return 2 if len(output.shape) == 3 and output.shape[2] in output.words else None


def _axis_of_pixels(output: _Output) -> int | None:
    shape = output.shape
    same = [image for image in output.images if len(shape) == 4 and shape[2:] == image[2:]]
    return 1 if same and shape[1] > max(COLOURS, *(image[1] for image in same)) else None


def _axis_beside_boxes(output: _Output) -> int | None:
    shape = output.shape
    if len(shape) == 3 and shape[2] not in (1, BOX) and (*shape[:2], BOX) in output.others:
        return 2
    maps = len(shape) > 2 and shape[1] not in (1, BOX) and (shape[0], BOX, *shape[2:]) in output.others
    return 1 if maps else None


CLASS_AXES: tuple[Callable[[_Output], int | None], ...] = (
    _axis_chosen_along,
    _axis_of_one_row,
    _axis_of_words,
    _axis_of_pixels,
    _axis_beside_boxes,
)
"""Signs of class scores, the surest first: each returns the axis of the classes, or None. An output

* that the model's own softmax, log-softmax or argmax goes along holds classes along that axis;
* of shape (images, two or more) holds classes, and so do several such rows for each image, unless it is the state of
  a recurrent layer;
* (images, positions, V), where the model looks its input up in a table of V rows, is the next word at each position;
* (images, C, H, W) of the input's height and width, C above 3 and its channels, is the class of each pixel;
* (images, anchors, K) beside boxes (images, anchors, 4), or (images, K, ...) beside (images, 4, ...), is the class of
  each anchor.
"""


def answer_loss(asked: str | LossFunction | None, module: GraphModule, inputs: tuple[Tensor, ...]) -> Loss:
    """Return the loss of a model's answers as `answer_graph` gives them: the one asked for, or the one that fits.

    By default the losses of the outputs are added: "kl" along the classes of each position, "bce" for what goes through
    a sigmoid, "mse" for all other values.

    Args:
        asked: a name for the first output, names joined by "+" for the first ones in order, a function, or None.
        module: a float graph.
        inputs: a few images.

    Raises:
        OptionError: an unknown name, or more names than outputs.
    """
    answers: list[Answer | None] = [*find_answers(module.graph)] or [None]
    made = answer_parts(module)(*inputs)
    values = list(made) if len(answers) > 1 else [first_tensor(made)]
    shapes = [tuple(value.shape) for value in values]
    if asked is not None and not isinstance(asked, str):
        return FunctionLoss(asked, [shape[1:] for shape in shapes], partial(_returned, answers))
    images = [shape_of(node) for node in placeholders(module.graph) if len(shape_of(node)) == 4]
    words = _words(module.graph)
    outputs = [_Output(s, a, shapes, images, words) for s, a in zip(shapes, answers, strict=True)]
    together = [len([*group]) for group in _by_output(answers)]
    names = [None] * len(together) if asked is None else [*map(loss_of, asked.split(JOIN))]
    if len(names) > len(together):
        raise OptionError(f"loss {asked!r} has {len(names)} names; the model has {len(together)} float outputs")
    each = [name for name, count in zip(names, together, strict=False) for _ in range(count)]
    parts = [_part(output, loss) for output, loss in zip(outputs, each, strict=False)]
    parts += [Part(None, output.shape[1:]) for output in outputs[len(parts) :]]
    alone = parts[0] if len(parts) == 1 else None
    if alone is not None and alone.loss is not None and alone.axis == 1:
        return alone.loss
    return JointLoss(parts)


def _part(output: _Output, loss: Loss | None) -> Part:
    axis = next((axis for sign in CLASS_AXES if (axis := sign(output)) is not None), None)
    if loss is None:
        independent = output.answer is not None and output.answer.independent
        loss = LOSSES["bce" if independent else "mse" if axis is None else "kl"]
    return Part(loss, output.shape[1:], 1 if axis is None or loss is LOSSES["mse"] else axis)


def _words(graph: Graph) -> frozenset[int]:
    tables = [shape_of(node.args[0]) for node in graph.nodes if op_name(node) == "embedding"]
    return frozenset(shape[0] for shape in tables if shape)


def _by_output(answers: Sequence[Answer | None]) -> list[list[Answer | None]]:
    """Return the answers that belong to each output: the parts of one that joins them, or one alone."""
    groups: list[list[Answer | None]] = []
    for answer in answers:
        before = groups[-1][-1] if groups else None
        if answer is not None and before is not None and answer.joined is not None and answer.joined is before.joined:
            groups[-1].append(answer)
        else:
            groups.append([answer])
    return groups


def _returned(answers: Sequence[Answer | None], values: Sequence[Tensor]) -> list[Tensor]:
    """Return the model's outputs for the values that are compared in their place."""
    given, made = iter(values), list[Tensor]()
    for group in _by_output(answers):
        shown = [_shown(answer, value) for answer, value in zip(group, given, strict=False)]
        whole = group[0].joined if group[0] is not None else None
        made.append(shown[0] if whole is None else whole.rebuilt(shown))
    return made


def _shown(answer: Answer | None, value: Tensor) -> Tensor:
    return value if answer is None or answer.scores is None else answer.scores.shown(value, answer.classes)
