"""How recurrent layers are written in ONNX: one LSTM, GRU or RNN node for each layer.

PyTorch's exporter writes them too, after decomposing every time step in order to trace it, which takes minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node

from fxquant.backends.onnx.emitters import emits
from fxquant.backends.onnx.lowering import Lowering, dims
from fxquant.backends.onnx.shape_emitters import EMITTERS
from fxquant.backends.qdq_ops import stored_channels
from fxquant.core.ir import arguments, erase_dead, finish, is_constant

aten = torch.ops.aten

__all__ = ["EMITTERS"]

OPERATORS: dict[object, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    aten.lstm.input: ("LSTM", (0, 3, 1, 2), {}),
    # PyTorch multiplies by the reset gate behind the product.
    aten.gru.input: ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    aten.rnn_tanh.input: ("RNN", (0,), {"activations": "Tanh"}),
    aten.rnn_relu.input: ("RNN", (0,), {"activations": "Relu"}),
}
"""Recurrent op -> ONNX operator, the places of its gates in PyTorch's order, attributes."""
ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)


def _states(given: dict[str, Any]) -> list[Any]:
    return list(given["hx"]) if isinstance(given["hx"], list | tuple) else [given["hx"]]


def _has_form(node: Node) -> bool:
    """Whether a node reads a batch of sequences, and parameters without projections."""
    given, (_, gates, _) = arguments(node), OPERATORS[node.target]
    params, shape = given["params"], dims(given["input"])
    each = 4 if given["has_biases"] else 2
    layers = given["num_layers"] * (2 if given["bidirectional"] else 1)
    known = all(is_constant(p) or getattr(p, "target", None) is stored_channels for p in params)
    square = all(dims(r)[0] == len(gates) * int(dims(r)[1]) for r in params[1::each])
    return len(shape) == 3 and len(params) == each * layers and known and square


def drop_zero_states(module: GraphModule) -> GraphModule:
    """Let recurrent layers that start from zeros read no state, in place: that is what ONNX means by none."""
    for node in module.graph.nodes:
        if node.target in OPERATORS and _has_form(node):
            states = _states(arguments(node))
            if all(isinstance(state, Node) and state.target in ZEROS for state in states):
                node.args = (node.args[0], [] if node.target is aten.lstm.input else None, *node.args[2:])
    erase_dead(module)
    return finish(module)


@emits(*OPERATORS)
def _recurrent(lowering: Lowering, node: Node) -> tuple[str, ...] | None:
    if not _has_form(node):
        return None
    given, (operator, gates, attributes) = arguments(node), OPERATORS[node.target]
    ways, each = (2 if given["bidirectional"] else 1), (4 if given["has_biases"] else 2)
    hidden, first = int(dims(given["params"][1])[1]), given["batch_first"]
    order = np.concatenate([np.arange(gate * hidden, (gate + 1) * hidden) for gate in gates])
    states = [lowering.value(state) for state in _states(given) if state is not None]
    settings = {key: [value] * ways if key == "activations" else value for key, value in attributes.items()}
    settings["direction"] = "bidirectional" if ways == 2 else "forward"
    x = lowering.value(given["input"])
    x = lowering.write(node, "Transpose", [x], perm=[1, 0, 2]) if first else x
    unique, read = lowering.builder.unique, {user.args[1] for user in node.users}
    answers = (1, 2) if operator == "LSTM" else (1,)
    ends: dict[int, list[str]] = {k: [] for k in answers}
    for layer in range(given["num_layers"]):
        parts = [given["params"][(layer * ways + way) * each :][:each] for way in range(ways)]
        inputs = [x, *(_stacked(lowering, node, [part[k] for part in parts], order) for k in (0, 1))]
        inputs.append(_biases(lowering, node, [part[2:] for part in parts], order))
        span = [lowering.integers([end]) for end in (layer * ways, (layer + 1) * ways, 0)]
        # No lengths: every sequence counts whole.
        inputs += ["", *(lowering.write(node, "Slice", [state, *span]) for state in states)]
        while not inputs[-1]:
            inputs.pop()
        outputs = [unique(node.name), *(unique(node.name) if k in read else "" for k in answers)]
        lowering.builder.emit(operator, inputs, outputs, f"{node.name}.{layer}", hidden_size=hidden, **settings)
        # (steps, directions, images, hidden) -> directions side by side.
        last = first and layer == given["num_layers"] - 1
        moved = lowering.write(node, "Transpose", outputs[:1], perm=[2, 0, 1, 3] if last else [0, 2, 1, 3])
        x = lowering.write(node, "Reshape", [moved, lowering.integers([0, 0, ways * hidden])])
        for k in answers:
            ends[k].append(outputs[k])
    return x, *(_joined(lowering, node, ends[k]) if k in read else "" for k in answers)


def _stacked(lowering: Lowering, node: Node, weights: Sequence[Node], order: Any) -> str:
    """Return the weights of all directions, (directions, gates x hidden, inputs)."""
    axis = lowering.integers([0])
    rows = [lowering.write(node, "Unsqueeze", [lowering.float_weight(weight, order), axis]) for weight in weights]
    return _joined(lowering, node, rows)


def _joined(lowering: Lowering, node: Node, values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else lowering.write(node, "Concat", values, axis=0)


def _biases(lowering: Lowering, node: Node, biases: Sequence[Sequence[Node]], order: Any) -> str:
    """Return both biases of all directions side by side, (directions, 2 x gates x hidden); nothing without."""
    if not any(biases):
        return ""
    rows = [np.concatenate([lowering.array(bias)[order] for bias in pair]) for pair in biases]
    return lowering.constant(np.stack(rows), f"{node.name}.bias")
