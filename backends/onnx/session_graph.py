"""A graph that runs its model in ONNX Runtime and is called as the simulated graph is."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxquant.backends.onnx.export import to_onnx
from fxquant.backends.onnx.session import open_session, session_options


class Session(nn.Module):
    """A model in ONNX Runtime on the CPU: its inputs in order, its outputs as a tuple, without gradients.

    Args:
        model: the file.

    Raises:
        LoweringError: ONNX Runtime refuses the model.
    """

    def __init__(self, model: bytes) -> None:
        super().__init__()
        self.model = model
        self._session = open_session(model, session_options())
        self._names = [entry.name for entry in self._session.get_inputs()]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the model's outputs."""
        arrays = {n: t.detach().cpu().contiguous().numpy() for n, t in zip(self._names, inputs, strict=True)}
        return tuple(torch.from_numpy(np.asarray(answer)) for answer in self._session.run(None, arrays))

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        # A session cannot be copied, but opened twice.
        return Session(self.model)


def session_graph(module: GraphModule) -> GraphModule:
    """Return a graph that calls ONNX Runtime once, with the inputs and the structure of answers of the given one.

    Args:
        module: simulated or float graph; it is not changed.

    Raises:
        LoweringError: an op has no ONNX form, or ONNX Runtime refuses the model.
    """
    graph, model = Graph(), to_onnx(module).SerializeToString()
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    placeholders = [graph.node_copy(node) for node in module.graph.nodes if node.op == "placeholder"]
    call = graph.call_module("session", tuple(n for n in placeholders if isinstance(n.meta.get("val"), Tensor)))
    numbers: Iterator[int] = count()

    def answer(node: Node) -> Node:
        # The file lists its outputs in the order in which the graph returns them, one returned twice two times.
        taken = graph.call_function(operator.getitem, (call, next(numbers)))
        taken.meta = dict(node.meta)
        return taken

    graph.output(map_arg(output.args[0], answer))
    graph.set_codegen(copy.copy(module.graph._codegen))
    return GraphModule({"session": Session(model)}, graph, "SessionGraph").eval()
