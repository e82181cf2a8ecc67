"""Ops that cannot be used: random ones, those whose length depends on the data, whole layers of attention as one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._sympy.symbol import SymT, symbol_is_type

from fxquant.core.errors import CaptureError
from fxquant.core.ir import arguments, trace_line
from fxquant.core.run import op_name

SWITCHES: dict[str, Any] = {"train": False, "training": False, "p": 0.0, "dropout_p": 0.0, "dropout": 0.0}
"""Argument of a random op -> value with which it is not random."""

WHOLE_LAYERS = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")
"""Ops with all weights of a layer, which torch's fast path makes; they have no derivative."""


def check_ops(graph: Graph) -> None:
    """Do nothing where every answer follows from the input, its shape from the input's shape, layer by layer.

    Raises:
        CaptureError: one does not; the message names the op and its line in the model.
    """
    for node in _needed(graph):
        if _is_random(node):
            raise CaptureError(
                f"{node.target} draws random numbers in eval mode, at: {trace_line(node)}; no two answers can be "
                "compared; for dropout pass training=self.training, else give the numbers as an input"
            )
        if op_name(node) in WHOLE_LAYERS:
            raise CaptureError(
                f"{node.target} computes a whole layer as one op, whose weights cannot be quantized, at: "
                f"{trace_line(node)}; give the module itself, or export it after "
                "torch.backends.mha.set_fastpath_enabled(False)"
            )
    for node in graph.output_node().all_input_nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and any(_depends_on_data(size) for size in value.shape):
            source = next(n for n in _needed(graph) if _makes_length(n))
            raise CaptureError(
                f"the length of the answer depends on the data: {source.target} at: {trace_line(source)}; quantize the "
                'part of the model in front of it, fxquant.part(model, "backbone", images), or return the scores and '
                "pick from them outside the model"
            )


def _needed(graph: Graph) -> list[Node]:
    """Return the nodes that the output is computed from, in order."""
    needed = {graph.output_node()}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in needed]


def _is_random(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    if node.op != "call_function" or torch.Tag.nondeterministic_seeded not in tags:
        return False
    given = arguments(node)
    return all(given[name] != off for name, off in SWITCHES.items() if name in given)


def _depends_on_data(size: int | torch.SymInt) -> bool:
    return not isinstance(size, int) and any(
        symbol_is_type(symbol, SymT.UNBACKED_INT) for symbol in size.node.expr.free_symbols
    )


def _makes_length(node: Node) -> bool:
    value = node.meta.get("val")
    tensors = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(t, Tensor) and any(map(_depends_on_data, t.shape)) for t in tensors)
