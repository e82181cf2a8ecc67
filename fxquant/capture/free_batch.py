"""Frees the batch of graphs that hold it as a number: models that count it by `len()`, programs exported so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node

from fxquant.capture.exporting import summary, traced
from fxquant.core.errors import CaptureError
from fxquant.core.ir import RECURRENT, arguments, sizes

aten = torch.ops.aten

RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
FILLS = (aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format)
SIZES: dict[object, int] = {
    **dict.fromkeys((*RESHAPES, aten.expand.default), 1),
    **dict.fromkeys((aten.new_zeros.default, aten.new_ones.default, aten.new_full.default), 1),
    **dict.fromkeys(FILLS, 0),
}
"""Op -> argument position of the sizes it makes."""
HOW = "torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},)) on two images or more"
"""How to export with a free batch."""
CLOSE = 1e-3
"""Share of the largest answer by which answers of another batch size may differ: kernels sum in another order."""


def one_batch_size(exported: ExportedProgram) -> bool:
    """Whether the program takes as many images as it was traced with and no other number."""
    sizes = [value.shape[0] for value in _inputs(exported) if value.dim()]
    # A size that was fixed while tracing may still be a symbolic one, whose value is a number.
    return bool(sizes) and all(isinstance(size, int) or not size.node.expr.free_symbols for size in sizes)


def _inputs(exported: ExportedProgram) -> list[Tensor]:
    """Return the traced values of a program's inputs."""
    names = set(exported.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder" and node.name in names]
    return [value for value in values if isinstance(value, Tensor)]


def with_free_batch(model: nn.Module, inputs: tuple[Tensor, ...], shapes: tuple[Any, ...]) -> ExportedProgram:
    """Trace a model that fixed the batch by reading the bytecode, which follows `len(x)` where plain calls cannot.

    Raises:
        CaptureError: the batch is fixed all the same.
    """
    try:
        exported = traced(model, inputs, shapes, strict=True)
    except Exception as error:
        raise CaptureError(_model_advice(inputs, summary(error))) from error
    if one_batch_size(exported):
        raise CaptureError(_model_advice(inputs, "the graph holds it as a number"))
    return exported


def _model_advice(inputs: tuple[Tensor, ...], reason: str) -> str:
    return (
        f"the model takes {inputs[0].shape[0] if inputs[0].dim() else 1} images at a time and no other number "
        f"({reason}); use x.shape[0] or -1 where it writes the number of images into a shape, not len(x) or int(...)"
    )


def freed(exported: ExportedProgram, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """Return a program of one batch size as one of any, if its answers are the same.

    It is traced again, with every leading size that is the batch taken from the input; its answers for a batch of
    another size are compared with its own.

    Args:
        exported: the program; it is not changed.
        inputs: images to trace and to compare with.

    Raises:
        CaptureError: it holds its batch size in another way, or takes other images.
    """
    takes = _inputs(exported)
    for value, given in zip(takes, inputs, strict=False):
        if value.dtype != given.dtype or value.dim() != given.dim() or not _fit(value.shape[1:], given.shape[1:]):
            raise CaptureError(
                f"the exported program takes {_described(value)}, and the images are {_described(given)}; "
                "give images of the size and type it was exported with"
            )
    count = int(takes[0].shape[0])
    images = tuple(_images(t, max(2, count + 1)) for t in inputs)
    try:
        module = _loosened(exported, count)
        free = traced(module, images, tuple({0: Dim.AUTO} if t.dim() else None for t in images), strict=False)
    except Exception as error:
        raise CaptureError(_program_advice(count, summary(error))) from error
    if one_batch_size(free) or not all(map(_states_fit, free.graph.nodes)):
        raise CaptureError(_program_advice(count, "it holds that as a number"))
    if not _same_answers(exported, free, images, count):
        raise CaptureError(_program_advice(count, "a batch of another size would be answered differently"))
    return free


def _fit(known: Sequence[object], given: Sequence[int]) -> bool:
    return all(one == other for one, other in zip(known, given, strict=True) if isinstance(one, int))


def _described(value: Tensor) -> str:
    sizes = ", ".join("any" if not isinstance(size, int) else str(size) for size in value.shape[1:])
    return f"{str(value.dtype).removeprefix('torch.')} of (images, {sizes})"


def _program_advice(count: int, reason: str) -> str:
    return f"the exported program takes batches of {count} only ({reason}); export it with a free batch: {HOW}"


def _images(given: Tensor, count: int) -> Tensor:
    return given.repeat(-(-count // len(given)), *[1] * (given.dim() - 1))[:count] if given.dim() else given


def _states_fit(node: Node) -> bool:
    """Whether a recurrent layer has a first state for each of its sequences."""
    if node.target not in RECURRENT:
        return True
    given = arguments(node)
    states = given["hx"] if isinstance(given["hx"], list | tuple) else [given["hx"]]
    images = sizes(given["input"])[0 if given["batch_first"] else 1]
    return all(sizes(state)[1] == images for state in states)


def _same_answers(one: ExportedProgram, free: ExportedProgram, images: tuple[Tensor, ...], count: int) -> bool:
    """Whether a program answers one image more than the other as the other answers them, from either end."""
    with torch.no_grad():
        found = _answers(free, images)
        for start in {0, len(images[0]) - count}:
            known = _answers(one, tuple(t[start : start + count] if t.dim() else t for t in images))
            for part, whole in zip(known, found, strict=True):
                axes = [
                    axis for axis, size in enumerate(part.shape) if (size, whole.shape[axis]) == (count, len(images[0]))
                ]
                cut = whole.narrow(axes[0], start, count) if axes else whole
                if part.shape != cut.shape or not _close(part, cut):
                    return False
    return True


def _answers(exported: ExportedProgram, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(exported.module(check_guards=False)(*inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    return bool((one - other).abs().max() <= CLOSE * one.abs().max())


def _loosened(exported: ExportedProgram, count: int) -> GraphModule:
    """Return the program's graph with leading sizes of `count` taken from the first input."""
    module = exported.module(check_guards=False)
    assert isinstance(module, GraphModule)
    graph = module.graph
    entries = [node for node in graph.nodes if node.op == "placeholder"]
    from_images = set[Node](entries)
    with graph.inserting_after(entries[-1]):
        size = graph.call_function(aten.sym_size.int, (entries[0], 0))
    for node in list(graph.nodes):
        if from_images.intersection(node.all_input_nodes):
            from_images.add(node)
        position = SIZES.get(node.target, -1)
        made = node.args[position] if 0 <= position < len(node.args) else None
        if not isinstance(made, list | tuple) or not made or not isinstance(made[0], int) or made[0] <= 0:
            continue
        first: Any = size if made[0] == count else made[0]
        if node.target in RESHAPES:
            if node not in from_images or made[0] % count:
                continue
            # Several images may be counted on one axis, as in (images x windows).
            first = -1 if -1 not in made else first
            # A view of one image may need a copy for several.
            node.target = aten.reshape.default
        loose = [first, *made[1:]]
        if any(user.target in RECURRENT for user in node.users):
            # States count layers before images, and kernels do not check it.
            loose = [size if axis == 1 and known == count else known for axis, known in enumerate(made)]
        node.args = (*node.args[:position], loose, *node.args[position + 1 :])
    module.recompile()
    return module
