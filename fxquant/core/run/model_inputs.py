"""Images for a graph that is there already: brought to one set, and compared with what the graph takes."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule

from fxquant.core.errors import CalibrationError
from fxquant.core.run.data import CalibrationSet, collect


def images_for(module: GraphModule, given: object, limit: int | None = None) -> CalibrationSet:
    """Bring images to one set and compare their sizes and types with the inputs the graph was traced with.

    Args:
        module: ATen graph with traced values.
        given: iterable of batches, labelled or not, as for `collect`.
        limit: stop after this many images.

    Raises:
        CalibrationError: the images cannot be used, or are of another size or type than the graph takes.
    """
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    images = collect(given, [str(node.target) for node in nodes], limit)
    for node, tensor in zip(nodes, images.inputs, strict=True):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not _fits(value, tensor):
            raise CalibrationError(
                f"input {str(node.target)!r} takes {_told(value)}, and the images are {_told(tensor)}; "
                "give images as they were given to quantize"
            )
    return images


def _fits(value: Tensor, tensor: Tensor) -> bool:
    """Return whether a tensor is of the traced type and sizes, where those are fixed; any number of images will do."""
    pairs = list(zip(value.shape, tensor.shape, strict=False))[1:]
    sizes = all(known == given for known, given in pairs if isinstance(known, int))
    return value.dim() == tensor.dim() and value.dtype == tensor.dtype and sizes


def _told(tensor: Tensor) -> str:
    sizes = ["images", *(str(size) if isinstance(size, int) else "any" for size in tensor.shape[1:])]
    return f"{str(tensor.dtype).removeprefix('torch.')} of ({', '.join(sizes)})"
