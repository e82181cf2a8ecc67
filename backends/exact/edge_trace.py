"""What a graph computes on every quantized edge, as integers, and what it would compute from another's integers.

An edge is named after its quantizer in the simulated graph. Every form of the graph is read the same way: simulated,
explicit (`to_qdq`), exact (`exact_graph`) and lowered to PyTorch's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from fxquant.backends.qdq_ops import EDGE
from fxquant.core.ir import FakeQuantize, ScaleRule, is_constant, rule_of, site_name

EXACT = "exact_"
"""In front of the name of a node of the exact graph that takes the place of another one."""
BATCH = 16
"""Images that are traced at once."""
Integers = dict[str, Tensor]
"""Edge -> uint8 tensor."""


@dataclass(frozen=True)
class Trace:
    """One run: the outputs, and the integers of the edges that were seen.

    Args:
        output: the first output, float32.
        edges: what was on the edges.
        others: the further outputs, float32.
        leading: the values in front of answers that jump, by name, as far as they were seen.
    """

    output: Tensor
    edges: Integers = field(default_factory=dict)
    others: tuple[Tensor, ...] = ()
    leading: dict[str, Tensor] = field(default_factory=dict)


Tracer = Callable[[tuple[Tensor, ...]], Trace]
"""Runs a graph in some runtime and returns what was on its edges."""


def edge_labels(module: GraphModule) -> dict[str, str]:
    """Return edge -> where it is in the user's model, for example `layer1.0.conv1 (conv + relu)`, in graph order.

    Args:
        module: simulated graph.
    """
    return {node.name: _label(node) for node in activation_quantizers(module)}


def _label(node: Node) -> str:
    source, kinds = node.args[0], list[str]()
    assert isinstance(source, Node)
    while True:
        rule = rule_of(source)
        kinds.append(rule.kind if rule is not None else "input" if source.op == "placeholder" else source.name)
        first = source.args[0] if source.args else None
        if rule is None or rule.scale is not ScaleRule.ABSORB or not isinstance(first, Node):
            break
        source = first
    return f"{_place(source)} ({' + '.join(reversed(kinds))})"


def layer_name(node: Node) -> str | None:
    """Return the module path of the layer whose weight an op of a simulated graph reads, None where it reads none."""
    rule = rule_of(node)
    weight = node.args[rule.weight] if rule is not None and rule.weight is not None else None
    holder = weight.args[0] if isinstance(weight, Node) and weight.op == "call_module" else weight
    return site_name(str(holder.target)) if isinstance(holder, Node) and is_constant(holder) else None


def _place(node: Node) -> str:
    """Return the module path of a layer's weight, else of the module that calls the op, else the node's name."""
    layer = layer_name(node)
    if layer is not None:
        return layer
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if isinstance(stack, Mapping) and stack else ""
    # Paths are written as torch.export does: L['self'].layer1.0, or layer1.0.
    return path.removeprefix("L['self']").strip(".") or node.name


def activation_quantizers(module: GraphModule) -> list[Node]:
    """Return the nodes of a simulated graph that quantize activations, in graph order."""
    return [n for n in module.graph.nodes if _fake(module, n) is not None]


def _fake(module: GraphModule, node: Node) -> FakeQuantize | None:
    found = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return found if isinstance(found, FakeQuantize) and not is_constant(node.args[0]) else None


def run_traced(
    module: GraphModule,
    inputs: tuple[Tensor, ...],
    forced: Integers | None = None,
    leading: Collection[str] = (),
    change: Callable[[Node, Tensor], Tensor] | None = None,
) -> Trace:
    """Run a simulated, explicit or exact graph and return the integers on its edges.

    Args:
        module: the graph; its nodes are run one by one.
        inputs: its inputs.
        forced: integers to put on edges in the place of what was computed, after that was noted: then every layer
            computes from these (teacher forcing), and a difference is its own.
        leading: names of values in the simulated graph that are returned too.
        change: takes each node and its tensor, returns what later nodes read.
    """
    with torch.no_grad():
        interpreter = _Reader(module, forced or {}, leading, change)
        first, *others = outputs(interpreter.run(*inputs))
    return Trace(first, interpreter.edges, tuple(others), interpreter.leading)


def outputs(answer: object) -> list[Tensor]:
    """Return the tensors of a graph's answer as float32, in the order in which the graph returns them."""
    return [leaf.float() for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)]


class _Reader(Interpreter):
    def __init__(
        self,
        module: GraphModule,
        forced: Mapping[str, Tensor],
        leading: Collection[str],
        change: Callable[[Node, Tensor], Tensor] | None,
    ) -> None:
        super().__init__(module)
        self.source, self.forced, self.edges = module, forced, Integers()
        self.leading, self._wanted, self._change = dict[str, Tensor](), leading, change

    def run_node(self, node: Node) -> Any:
        value = self._on_edge(node, super().run_node(node))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        lead = node.name.removeprefix(EXACT)
        if lead in self._wanted:
            self.leading[lead] = value
        return value if self._change is None else self._change(node, value)

    def _on_edge(self, node: Node, value: Any) -> Any:
        """Note an edge's integers and return what is put in their place."""
        fake = _fake(self.source, node)
        name = node.name if fake is not None else node.meta.get(EDGE)
        if not isinstance(name, str):
            return value
        self.edges[name] = value if fake is None else _integers(value, fake)
        known = self.forced.get(name)
        if known is None or known.shape != value.shape:
            return value
        return known if fake is None else (known.float() - fake.zero_point) * fake.scale


def _integers(value: Tensor, fake: FakeQuantize) -> Tensor:
    return (torch.round(value / fake.scale) + fake.zero_point - fake.spec.qmin).to(torch.uint8)


def value_names(module: GraphModule) -> dict[str, str]:
    """Return edge -> name of the value with its integers in a file: q0, q1, ... in graph order."""
    return {node.name: f"q{index}" for index, node in enumerate(activation_quantizers(module))}
