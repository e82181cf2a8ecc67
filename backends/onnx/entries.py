"""What a file takes and returns: names, types and sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx
import torch
from onnx import helper
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.graph import _PyTreeCodeGen
from torch.utils._pytree import TreeSpec

from fxquant.backends.onnx.lowering import dims
from fxquant.core.errors import LoweringError

AXES = ("batch", "channels", "height", "width")
Path = tuple[int | str, ...]
"""Where a tensor is in a model's answer: keys of dictionaries, positions in tuples and lists."""


def output_names(graph: Graph) -> list[str]:
    """Return what each result is called: by the dictionary keys that lead to it, else `output`, `output_1`, ..."""
    values = torch.utils._pytree.tree_leaves(graph.output_node().args)
    codegen = graph._codegen
    spec = codegen.pytree_info.out_spec if isinstance(codegen, _PyTreeCodeGen) else None
    paths = list(_paths(spec, ())) if spec is not None else []
    if len(paths) != len(values):
        paths = [()] * len(values)
    kept = [path for value, path in zip(values, paths, strict=True) if isinstance(value, Node)]
    return [_name(path, index) for index, path in enumerate(kept)]


def _name(path: Path, index: int) -> str:
    keyed = any(isinstance(step, str) for step in path)
    return "_".join(map(str, path)) if keyed else "output" if index == 0 else f"output_{index}"


def _paths(spec: TreeSpec, path: Path) -> Iterator[Path]:
    """Yield the path of each leaf of an answer."""
    if spec.is_leaf():
        yield path
        return
    # Dictionaries, and the outputs of Hugging Face models, keep their keys; a named tuple keeps its type.
    keys = getattr(spec.context, "_fields", spec.context)
    count = spec.num_children
    steps = keys if isinstance(keys, list | tuple) and len(keys) == count else range(count)
    for step, child in zip(steps, spec.children(), strict=True):
        yield from _paths(child, (*path, step if isinstance(step, int) else str(step)))


def value_info(node: Node, name: str) -> onnx.ValueInfoProto:
    """Return the description of an input or an output, its free sizes by name.

    Raises:
        LoweringError: a type that ONNX Runtime does not take.
    """
    called = _symbols(node.graph)
    shape = [
        size if isinstance(size, int) else re.sub(r"s\d+", lambda m: called.get(m[0], m[0]), str(size))
        for size in dims(node)
    ]
    try:
        if node.meta["val"].is_complex():
            raise TypeError("complex")
        kind = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=node.meta["val"].dtype).numpy().dtype)
    except TypeError as error:
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        raise LoweringError(
            f"input or output {name!r} of the model is {dtype}, which the ONNX Runtime backend does not support; "
            "let the model take and return float32, complex numbers as torch.view_as_real(...)"
        ) from error
    return helper.make_tensor_value_info(name, kind, shape)


def _symbols(graph: Graph) -> dict[str, str]:
    """Return what torch calls free sizes (s0, s77, ...) of an input -> what they are."""
    entries = [node for node in graph.nodes if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)]
    # The leading size is the batch, whatever an input holds; what the first image says goes before later ones.
    pairs = [zip(dims(node), AXES[: None if len(dims(node)) == len(AXES) else 1], strict=False) for node in entries]
    return {str(size): word for pair in reversed(pairs) for size, word in pair if not isinstance(size, int)}
