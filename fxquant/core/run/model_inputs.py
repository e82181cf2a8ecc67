"""Collects images for a captured graph and checks that they fit its inputs."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule

from fxquant.core.errors import CalibrationError
from fxquant.core.run.data import CalibrationSet, collect
from fxquant.core.run.runner import placeholders


def images_for(module: GraphModule, given: object, limit: int | None = None) -> CalibrationSet:
    """Collect images into one set and compare their sizes and types with the inputs the graph was traced with.

    Args:
        module: ATen graph with traced values.
        given: iterable of batches, labelled or not, as for `collect`.
        limit: stop after this many images.

    Raises:
        CalibrationError: the images cannot be used, or are of another size or type than the graph takes.
    """
    nodes = placeholders(module.graph)
    images = collect(given, [str(node.target) for node in nodes], limit)
    for node, tensor in zip(nodes, images.inputs, strict=True):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not _fits(value, tensor):
            raise CalibrationError(
                f"input {str(node.target)!r} takes {_described(value)}, and the images are {_described(tensor)}; "
                "give images of the size and type that quantize was given"
            )
    return images


def _fits(value: Tensor, tensor: Tensor) -> bool:
    """Whether a tensor has the traced type and the traced sizes, where those are fixed, for any number of images."""
    pairs = list(zip(value.shape, tensor.shape, strict=False))[1:]
    sizes = all(known == given for known, given in pairs if isinstance(known, int))
    return value.dim() == tensor.dim() and value.dtype == tensor.dtype and sizes


def _described(tensor: Tensor) -> str:
    sizes = ["images", *(str(size) if isinstance(size, int) else "any" for size in tensor.shape[1:])]
    return f"{str(tensor.dtype).removeprefix('torch.')} of ({', '.join(sizes)})"
