"""Which values of a graph are states of recurrent layers, and not scores."""

from __future__ import annotations

from torch.fx import Node

from fxquant.core.run.answer_scores import MOVES
from fxquant.core.run.discrete_answers import op_name

LAYERS = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
CELLS = frozenset(f"{layer}_cell" for layer in LAYERS)
GATES = frozenset(("sigmoid", "tanh"))
ARITHMETIC = frozenset(("add", "sub", "rsub", "mul"))
FIRST = frozenset(("relu", "zeros", "new_zeros", "zeros_like"))
"""What makes the state that a cell with ReLU reads, where it is no input."""


def is_state(value: Node) -> bool:
    """Whether a value is the state of a recurrent layer: made by one, or by gates alone, as in a cell written out.

    Sums and products of what gates make, and of the states before, are states; scores come from a layer with weights.
    A state that a ReLU makes is that of the sum of two layers, one of which reads a state.
    """
    waiting, seen, gated = [value], set[Node](), False
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        name, sources = op_name(node), node.all_input_nodes
        if name in LAYERS | CELLS or name in GATES or _is_rectified_state(node):
            gated = True
        elif name in MOVES:
            waiting += sources[:1]
        elif name in ARITHMETIC:
            waiting += sources
        elif node.op != "placeholder":
            return False
    return gated


def _is_rectified_state(node: Node) -> bool:
    if op_name(node) != "relu" or op_name(node.all_input_nodes[0]) != "add":
        return False
    terms = node.all_input_nodes[0].all_input_nodes
    return len(terms) == 2 and all(op_name(term) == "linear" for term in terms) and any(map(_reads_state, terms))


def _reads_state(layer: Node) -> bool:
    source = layer.all_input_nodes[0]
    return source.op == "placeholder" or op_name(source) in FIRST
