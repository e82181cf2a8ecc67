"""Traced shapes: what a node's tensor measures, for the batch it was traced with and for one image."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, Node


def shape_of(node: object) -> tuple[int, ...]:
    """Return the traced shape of a node's tensor, the dynamic batch counted as traced (its hint)."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(_hint(size) for size in value.shape)


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1


def traced(compute: Callable[..., Tensor], value: Tensor) -> Tensor:
    """Return what a computation makes of a node's traced value, free sizes kept free.

    Outside of the mode that traced it, some ops ask a value for its sizes as numbers, and torch then fixes them in the
    whole graph and in everything made of it.
    """
    mode = getattr(value, "fake_mode", None)
    if mode is None:
        return compute(value)
    with mode, enable_python_dispatcher():
        return compute(value)


def sizes(node: Node) -> tuple[object, ...]:
    """Return the sizes of a node's tensor to compare with those of another: numbers, free ones as expressions."""
    return tuple(size if isinstance(size, int) else size.node.expr for size in node.meta["val"].shape)


def images_axis(node: Node) -> int | None:
    """Return the axis of a node's tensor that counts images, None where they do not show."""
    sizes = node.meta["val"].shape
    return next((k for k, s in enumerate(sizes) if not isinstance(s, int) and counts_images(s, node.graph)), None)


def counts_images(size: int | torch.SymInt, graph: Graph) -> bool:
    """Whether a size grows with the number of images; in a graph that takes one number of them, whether it is that."""
    counted_in = _images_symbols(graph)
    if isinstance(size, int):
        return not counted_in and size == traced_images(graph)
    # A free height or width is no number of images.
    return not counted_in or bool(counted_in & _symbols(size))


def traced_images(graph: Graph) -> int:
    """Return the images the graph was traced with; an op in the middle may hold them on any axis."""
    shapes = [shape_of(node) for node in graph.nodes if node.op == "placeholder"]
    return next((shape[0] for shape in shapes if shape and shape[0] > 0), 1)


def sample_shape(node: Node) -> tuple[int, ...]:
    """Return the shape of a node's tensor for one image, wherever the images are among its axes."""
    return _one_of(node.meta.get("val"), node.graph)


def _one_of(value: object, graph: Graph) -> tuple[int, ...]:
    sizes = value.shape if isinstance(value, torch.Tensor) else ()
    images = traced_images(graph)

    def of_one(size: int | torch.SymInt) -> int:
        counts = not isinstance(size, int) and counts_images(size, graph)
        return max(1, _hint(size) // images) if counts else _hint(size)

    return tuple(of_one(size) for size in sizes)


def _images_symbols(graph: Graph) -> set[object]:
    """Return the symbols in which the number of images is counted."""
    values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    sizes = [value.shape[0] for value in values if isinstance(value, torch.Tensor) and value.dim()]
    return {symbol for size in sizes for symbol in _symbols(size)}


def _symbols(size: int | torch.SymInt) -> set[object]:
    return set() if isinstance(size, int) else set(size.node.expr.free_symbols)


def sample_elements(node: Node) -> tuple[int, int]:
    """Return how many elements a node makes for one image, all its tensors together, and the bytes of the widest.

    Floating-point numbers count as float32, the yardstick, whatever type the parameters happen to have.
    """
    value = node.meta.get("val")
    tensors = [t for t in (value if isinstance(value, tuple | list) else [value]) if isinstance(t, torch.Tensor)]
    widest = max((4 if t.is_floating_point() else t.element_size() for t in tensors), default=0)
    return sum(prod(_one_of(tensor, node.graph)) for tensor in tensors), widest
