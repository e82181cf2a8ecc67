"""The `torch.compile` backend."""

from __future__ import annotations

from fxquant.dynamo.backend import CompileOptions, compile_graph
from fxquant.dynamo.boundary import DynamoGraph, caller_arguments, free_batch
from fxquant.dynamo.transfer import check_same_model, graph_of, input_nodes, renamed

__all__ = [
    "CompileOptions",
    "DynamoGraph",
    "caller_arguments",
    "check_same_model",
    "compile_graph",
    "free_batch",
    "graph_of",
    "input_nodes",
    "renamed",
]
