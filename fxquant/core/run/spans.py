"""Stretches of a graph as graphs of their own: the unit that is tuned, and the suffix behind it.

A span is a set of neighbouring nodes with the values that flow in and out. Cut out with its quantizers it is the
simulated unit; cut out without them it is the float unit; all nodes behind a cut, without quantizers, are the suffix
through which the loss of the network is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxquant.core.ir import FakeQuantize, finish, set_module, tensor_at, traced_images

Values = Mapping[str, Tensor]
"""Node name -> value over some images, images along axis 0."""


def varying_nodes(graph: Graph) -> list[Node]:
    """Return the nodes that depend on the input, placeholders and output left out, in graph order."""
    seen: set[Node] = {node for node in graph.nodes if node.op == "placeholder"}
    found = []
    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and any(source in seen for source in node.all_input_nodes):
            seen.add(node)
            found.append(node)
    return found


def is_tensor(node: Node) -> bool:
    """Whether a node's value is one tensor."""
    return isinstance(node.meta.get("val"), Tensor)


def is_size(node: Node) -> bool:
    """Whether a node's value is a number, such as a batch size read from a tensor."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat)


def is_quantizer(module: GraphModule, node: Node) -> bool:
    """Whether a node is a fake-quant node, on an activation or a weight."""
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), FakeQuantize)


@dataclass(frozen=True)
class Span:
    """Some nodes of a graph as a module.

    Args:
        module: takes the input tensors, then the sizes; returns a tuple of the outputs.
        inputs: names of the nodes whose values are taken, images along axis 0.
        sizes: name of each number the nodes read -> its value for one image; it grows with the images.
        outputs: names of the nodes whose values are returned.
    """

    module: Callable[..., tuple[Tensor, ...]] = field(repr=False)
    inputs: tuple[str, ...]
    sizes: dict[str, int]
    outputs: tuple[str, ...]

    def __call__(self, values: Values) -> dict[str, Tensor]:
        """Return output name -> value for these input values."""
        tensors = [values[name] for name in self.inputs]
        images = len(tensors[0]) if tensors else 1
        answers = self.module(*tensors, *(size * images for size in self.sizes.values()))
        return dict(zip(self.outputs, answers, strict=True))

    def compiled(self) -> Span:
        """Return the same, its graph handed to torch.compile."""
        return replace(self, module=torch.compile(self.module))

    def run(self, values: Values, batch: int) -> dict[str, Tensor]:
        """Return the same over many images, `batch` at a time, without gradient."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.outputs}
        images = len(values[self.inputs[0]])
        with torch.no_grad():
            for start in range(0, images, batch):
                piece = {name: values[name][start : start + batch] for name in self.inputs}
                for name, answer in self(piece).items():
                    parts[name].append(answer)
        return {name: torch.cat(pieces) for name, pieces in parts.items()}


def cut_span(
    module: GraphModule,
    names: Iterable[str],
    outputs: Iterable[str],
    quantized: bool,
    replacements: Mapping[str, nn.Module] | None = None,
) -> Span:
    """Return some varying nodes of a graph, with the constants they read, as a span.

    Parameters become buffers that share their memory: a span trains nothing but what `replacements` bring along.

    Args:
        module: a float or simulated graph; it is not changed.
        names: the nodes; whatever else they read that varies becomes an input.
        outputs: those whose values are returned.
        quantized: False leaves every fake-quant node out, on weights too.
        replacements: fake-quant node name -> module that takes its place.
    """
    inside, wanted = set(names), list(outputs)
    varying = {node for node in module.graph.nodes if node.op == "placeholder"} | set(varying_nodes(module.graph))
    chosen = [node for node in module.graph.nodes if node.name in inside]
    graph, copies = Graph(), dict[Node, Node]()
    outside = dict.fromkeys(s for node in chosen for s in node.all_input_nodes if s in varying and s.name not in inside)
    tensors, sizes = [n for n in outside if not is_size(n)], [n for n in outside if is_size(n)]
    for source in (*tensors, *sizes):
        copies[source] = graph.placeholder(source.name)
        copies[source].meta = dict(source.meta)
    swapped: dict[str, nn.Module] = {}

    def copied(node: Node) -> Node:
        if node in copies:
            return copies[node]
        quantizer = is_quantizer(module, node)
        if quantizer and not quantized:
            copies[node] = copied(node.all_input_nodes[0])
            return copies[node]
        for source in node.all_input_nodes:
            copied(source)
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if quantizer and replacements is not None and node.name in replacements:
            swapped[str(node.target)] = replacements[node.name]
        return copies[node]

    by_name = {node.name: node for node in chosen}
    for node in chosen:
        copied(node)
    graph.output(tuple(copied(by_name[name]) for name in wanted))
    made = GraphModule(module, graph)
    for path, replacement in swapped.items():
        set_module(made, path, replacement)
    _freeze(made)
    images = traced_images(module.graph)
    return Span(
        finish(made), tuple(n.name for n in tensors), {n.name: _size(n) // images for n in sizes}, tuple(wanted)
    )


def _size(node: Node) -> int:
    value = node.meta["val"]
    hint = value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat) else value
    return int(hint)


def _freeze(module: GraphModule) -> None:
    """Put buffers in the place of the parameters that the graph reads; containers are the span's own."""
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        *parents, leaf = str(node.target).split(".")
        holder = module.get_submodule(".".join(parents))
        if isinstance(getattr(holder, leaf), nn.Parameter):
            value = tensor_at(module, str(node.target)).detach()
            delattr(holder, leaf)
            holder.register_buffer(leaf, value)
