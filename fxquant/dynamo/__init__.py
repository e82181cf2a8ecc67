"""The `torch.compile` backend."""

from __future__ import annotations

from fxquant.dynamo.backend import CompileOptions, compile_graph
from fxquant.dynamo.boundary import DynamoGraph, caller_arguments, free_batch
from fxquant.dynamo.transfer import check_same_model, graph_of, input_nodes, renamed
