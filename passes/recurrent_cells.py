"""Rewrite cells of recurrent layers as two linear layers and gates, so that both products run on integers.

With input x, state h, a = x W_ih' + b_ih and b = h W_hh' + b_hh, and s the sigmoid, one step of

    LSTM   i, f, g, o = a + b in parts;  c' = s(f) c + s(i) tanh(g);  h' = s(o) tanh(c')
    GRU    r, z from a + b;  n = tanh(a_n + s(r) b_n);  h' = n + s(z) (h - n)
    RNN    h' = tanh(a + b), or relu(a + b)

Biases may be missing. The parameters stay where they are, so steps that share them, or layers that are tied to them,
still do. Source: the definitions of `torch.nn.LSTMCell`, `GRUCell` and `RNNCell`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant.core.ir import arguments, is_constant, shape_of, trace

aten = torch.ops.aten


class _Step:
    """One step of a cell.

    Args:
        module: the graph's.
        cell: what is replaced; new nodes come in front of it.
    """

    def __init__(self, module: GraphModule, cell: Node) -> None:
        self._graph, self._cell, given = module.graph, cell, arguments(cell)
        states = given["hx"]
        self.states: list[Node] = list(states) if isinstance(states, list | tuple) else [states]
        self.hidden = shape_of(given["w_hh"])[1]
        self.from_input = self.op(aten.linear.default, given["input"], given["w_ih"], given["b_ih"])
        self.from_state = self.op(aten.linear.default, self.states[0], given["w_hh"], given["b_hh"])

    def op(self, target: Callable[..., Any], *operands: Any) -> Node:
        """Append an op and return its node."""
        while operands[-1] is None:
            operands = operands[:-1]
        with self._graph.inserting_before(self._cell):
            node = self._graph.call_function(target, operands)
        # Reports and patterns read where a node comes from.
        node.meta = {key: value for key, value in self._cell.meta.items() if key != "val"}
        return trace(node)

    def part(self, value: Node, place: int, count: int = 1) -> Node:
        """Return `count` gates of a value that holds all of them, from the one at `place` on."""
        return self.op(aten.slice.Tensor, value, 1, place * self.hidden, (place + count) * self.hidden)

    def sum(self, one: Node, other: Node) -> Node:
        """Return the sum of two values."""
        return self.op(aten.add.Tensor, one, other)

    def product(self, one: Node, other: Node) -> Node:
        """Return the product of two values, element by element."""
        return self.op(aten.mul.Tensor, one, other)

    def sigmoid(self, value: Node) -> Node:
        """Return the sigmoid of a value."""
        return self.op(aten.sigmoid.default, value)

    def tanh(self, value: Node) -> Node:
        """Return the hyperbolic tangent of a value."""
        return self.op(aten.tanh.default, value)


def _lstm(step: _Step) -> tuple[Node, ...]:
    gates = step.sum(step.from_input, step.from_state)
    new, kept, made, shown = (step.part(gates, place) for place in range(4))
    old = step.product(step.sigmoid(kept), step.states[1])
    cell = step.sum(old, step.product(step.sigmoid(new), step.tanh(made)))
    return step.product(step.sigmoid(shown), step.tanh(cell)), cell


def _gru(step: _Step) -> tuple[Node, ...]:
    gates = step.sigmoid(step.sum(step.part(step.from_input, 0, 2), step.part(step.from_state, 0, 2)))
    reset, kept = (step.part(gates, place) for place in range(2))
    made = step.tanh(step.sum(step.part(step.from_input, 2), step.product(reset, step.part(step.from_state, 2))))
    return (step.sum(made, step.product(kept, step.op(aten.sub.Tensor, step.states[0], made))),)


def _rnn(activation: Callable[..., Any]) -> Callable[[_Step], tuple[Node, ...]]:
    return lambda step: (step.op(activation, step.sum(step.from_input, step.from_state)),)


CELLS: dict[object, Callable[[_Step], tuple[Node, ...]]] = {
    aten.lstm_cell.default: _lstm,
    aten.gru_cell.default: _gru,
    aten.rnn_tanh_cell.default: _rnn(aten.tanh.default),
    aten.rnn_relu_cell.default: _rnn(aten.relu.default),
}
"""Recurrent cell -> what returns its new states."""


def as_linear_layers(module: GraphModule, node: Node) -> int:
    """Rewrite a recurrent cell whose weights are parameters as linear layers and gates; return how many, 1 or 0."""
    compute = CELLS.get(node.target)
    if compute is None or not all(is_constant(arguments(node)[weight]) for weight in ("w_ih", "w_hh")):
        return 0
    made = compute(_Step(module, node))
    for user in list(node.users) if len(made) > 1 else ():
        assert user.target is operator.getitem
        place = user.args[1]
        assert isinstance(place, int)
        user.replace_all_uses_with(made[place])
        module.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(made[0])
    module.graph.erase_node(node)
    return 1
