"""Stretches of a graph as graphs of their own: the unit that is tuned, the suffix behind it, one op to be timed.

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

from fxquant.core.ir import (
    FakeQuantize,
    ScaleRule,
    consumers,
    finish,
    rule_of,
    sample_shape,
    set_module,
    tensor_at,
    traced_images,
)
from fxquant.core.run.runner import dependents, placeholders

Values = Mapping[str, Tensor]
"""Node name -> value over some images, images along axis 0."""


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
        # Sizes of the traced graph are products with the batch: they grow with the images at hand.
        images = len(tensors[0]) if tensors else 1
        answers = self.module(*tensors, *(size * images for size in self.sizes.values()))
        return dict(zip(self.outputs, answers, strict=True))

    def compiled(self) -> Span:
        """Return the same span, its graph passed through torch.compile."""
        return replace(self, module=torch.compile(self.module))

    def run(self, values: Values, batch: int) -> dict[str, Tensor]:
        """Return the outputs over many images, `batch` at a time, without gradient."""

        def take(index: Tensor) -> Values:
            return {name: values[name][int(index[0]) : int(index[-1]) + 1] for name in self.inputs}

        return self.over(take, len(values[self.inputs[0]]), batch)

    def over(
        self, take: Callable[[Tensor], Values], images: int, batch: int, kept: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Return the outputs over many images whose input values are made batch by batch, without gradient.

        Args:
            take: positions of images -> input name -> their values.
            images: how many there are.
            batch: images at a time.
            kept: type that floating-point outputs are kept in; None leaves theirs.
        """
        parts: dict[str, list[Tensor]] = {name: [] for name in self.outputs}
        with torch.no_grad():
            for index in torch.split(torch.arange(images), batch):
                for name, answer in self(take(index)).items():
                    parts[name].append(answer if kept is None or not answer.is_floating_point() else answer.to(kept))
        return {name: torch.cat(pieces) for name, pieces in parts.items()}


def cut_span(
    module: GraphModule,
    names: Iterable[str],
    outputs: Iterable[str],
    quantized: bool,
    replacements: Mapping[str, nn.Module] | None = None,
) -> Span:
    """Return some varying nodes of a graph, with the constants they read, as a span.

    Parameters become buffers that share their memory: nothing in a span can be trained but what `replacements` bring.

    Args:
        module: a float or simulated graph; it is not changed.
        names: the nodes; every other varying value they read becomes an input.
        outputs: those whose values are returned.
        quantized: False leaves every fake-quant node out, on weights too.
        replacements: fake-quant node name -> module that takes its place; op node name -> module without arguments
            that returns its bias.
    """
    inside, wanted = set(names), tuple(outputs)
    varying = dependents(module.graph.nodes, placeholders(module.graph))
    chosen = {node.name: node for node in module.graph.nodes if node.name in inside}
    # A dictionary keeps the order of first reading, which fixes the order of the inputs from run to run.
    read = dict.fromkeys(source for node in chosen.values() for source in node.all_input_nodes)
    outside = [node for node in read if node in varying and node.name not in inside]
    # Sizes do not depend on the values of images: they are separate arguments, scaled with the batch.
    tensors, sizes = [n for n in outside if not is_size(n)], [n for n in outside if is_size(n)]
    copy = _Copy(module, {node: node.name for node in (*tensors, *sizes)}, quantized)
    for node in chosen.values():
        copy.of(node)
    copy.graph.output(tuple(copy.of(chosen[name]) for name in wanted))
    made = GraphModule(module, copy.graph)
    for name, replacement in (replacements or {}).items():
        # A fake-quant node that no output depends on was not copied.
        if name in copy.quantizers:
            set_module(made, copy.quantizers[name], replacement)
        elif name in chosen and rule_of(chosen[name]) is not None:
            _put_bias(made, copy.of(chosen[name]), replacement)
    _freeze(made)
    images = traced_images(module.graph)
    return Span(finish(made), tuple(n.name for n in tensors), {n.name: _size(n) // images for n in sizes}, wanted)


def cut_out(module: GraphModule, node: Node) -> tuple[GraphModule, tuple[int, ...]]:
    """Return a graph of one weighted op with its quantizers and the clip it absorbs, and the shape of its input
    for one image.

    Args:
        module: float or simulated graph.
        node: op whose first argument is its activation and whose other tensor arguments are constants.
    """
    source = node.args[0]
    assert isinstance(source, Node)
    # The quantizer of the input belongs to the op: it is part of what a runtime executes for it.
    outside = source.all_input_nodes[0] if source.op == "call_module" else source
    copy = _Copy(module, {outside: "x"}, True)
    copy.graph.output(copy.of(_end(node)))
    return GraphModule(module, copy.graph), sample_shape(outside)


class _Copy:
    """A graph that nodes of another one are copied into, each behind all that it reads.

    Args:
        module: the graph that is read.
        inputs: node -> name of the placeholder that takes its place.
        quantized: False leaves fake-quant nodes out.
    """

    def __init__(self, module: GraphModule, inputs: Mapping[Node, str], quantized: bool) -> None:
        self.graph = Graph()
        #: name of each fake-quant node copied -> path of its module
        self.quantizers: dict[str, str] = {}
        self._module, self._quantized = module, quantized
        self._copies: dict[Node, Node] = {}
        for node, name in inputs.items():
            self._copies[node] = self.graph.placeholder(name)
            self._copies[node].meta = dict(node.meta)

    def of(self, node: Node) -> Node:
        """Return the copy of a node."""
        if node in self._copies:
            return self._copies[node]
        quantizer = is_quantizer(self._module, node)
        # Without quantizers, a fake-quant node is what it reads.
        if quantizer and not self._quantized:
            self._copies[node] = self.of(node.all_input_nodes[0])
            return self._copies[node]
        for source in node.all_input_nodes:
            self.of(source)
        if quantizer:
            self.quantizers[node.name] = str(node.target)
        self._copies[node] = self.graph.node_copy(node, self._copies.__getitem__)
        return self._copies[node]


def _put_bias(module: GraphModule, op: Node, bias: nn.Module) -> None:
    """Let an op of a span read its bias from a module."""
    rule, path = rule_of(op), f"bias_of_{op.name}"
    assert rule is not None
    assert rule.bias is not None
    set_module(module, path, bias)
    with module.graph.inserting_before(op):
        made = module.graph.call_module(path)
    op.args = (*op.args[: rule.bias], *(None for _ in range(rule.bias - len(op.args))), made, *op.args[rule.bias + 1 :])


def _end(node: Node) -> Node:
    """Return the last of an op, the clip that it absorbs and the quantizer of its output."""
    users = consumers(node)
    # A value with several readers is read before the clip as well, so the kernel cannot absorb it.
    if len(users) != 1:
        return node
    if users[0].op == "call_module":
        return users[0]
    rule = rule_of(users[0])
    return _end(users[0]) if rule is not None and rule.scale is ScaleRule.ABSORB else node


def _size(node: Node) -> int:
    value = node.meta["val"]
    hint = value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat) else value
    return int(hint)


def _freeze(module: GraphModule) -> None:
    """Turn the parameters that the graph reads into buffers; the containers belong to this module alone."""
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        *parents, leaf = str(node.target).split(".")
        holder = module.get_submodule(".".join(parents))
        if isinstance(getattr(holder, leaf), nn.Parameter):
            # Detached, it shares the parameter's memory: a span costs no copy of the weights.
            value = tensor_at(module, str(node.target)).detach()
            delattr(holder, leaf)
            holder.register_buffer(leaf, value)
