"""The explicit integer graph of a simulated one: quantize and dequantize nodes, weights and biases as integers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.backends.qdq_ops import (
    EDGE,
    INT32_LIMIT,
    dequantize,
    dequantize_channels,
    quantize,
    stored_channels,
)
from fxquant.core.errors import LoweringError
from fxquant.core.ir import FakeQuantize, erase_dead, finish, fork, is_constant, rule_of, tensor_at


def to_qdq(module: GraphModule) -> GraphModule:
    """Turn a simulated graph into an explicit integer graph with the same answers up to the rounding of biases.

    Weights become int8 buffers `<path>_q` with `<path>_scale`; biases behind a quantized input become int32 with
    scale `input scale x weight scale`; every activation quantizer becomes `quantize`, with the quantizer's name in
    `meta[EDGE]`, followed by `dequantize`.

    Args:
        module: a simulated graph, or a float one, which is returned as a copy; it is not changed.

    Raises:
        LoweringError: a weight quantizer is not per channel and symmetric within int8.
    """
    qdq = fork(module)
    quantizers = {n: m for n in qdq.graph.nodes if (m := _quantizer(qdq, n)) is not None}
    weights = [node for node in quantizers if is_constant(node.args[0])]
    for node in weights:
        _lower_weight(qdq, node, quantizers[node], quantizers)
    for node in quantizers:
        if node not in weights:
            _lower_activation(qdq, node, quantizers[node])
    erase_dead(qdq)
    return finish(qdq)


def _quantizer(module: GraphModule, node: Node) -> FakeQuantize | None:
    found = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return found if isinstance(found, FakeQuantize) else None


def _lower_activation(module: GraphModule, node: Node, quantizer: FakeQuantize) -> None:
    source, spec, graph = node.args[0], quantizer.spec, module.graph
    assert isinstance(source, Node)
    if spec.signed or spec.channel_axis is not None:
        raise LoweringError(f"{node.name}: activations need one unsigned grid per tensor, not {spec}")
    base = source.name
    with graph.inserting_before(node):
        scale = _buffer(module, f"{base}_scale", quantizer.scale.detach())
        zero_point = _buffer(module, f"{base}_zero_point", quantizer.zero_point.detach())
        q = graph.create_node(
            "call_function", quantize, (source, scale, zero_point, spec.qmin, spec.qmax), name=f"{base}_q"
        )
        x = graph.create_node("call_function", dequantize, (q, scale, zero_point), name=f"{base}_dq")
    value = node.meta["val"]
    q.meta, x.meta = {**node.meta, "val": value.to(torch.uint8), EDGE: node.name}, dict(node.meta)
    node.replace_all_uses_with(x)
    graph.erase_node(node)


def _lower_weight(
    module: GraphModule, node: Node, quantizer: FakeQuantize, quantizers: dict[Node, FakeQuantize]
) -> None:
    source, spec = node.args[0], quantizer.spec
    assert isinstance(source, Node)
    path = str(source.target)
    if spec.channel_axis is None or not spec.symmetric:
        raise LoweringError(f"{path}: weights need a symmetric grid with one scale per channel, not {spec}")
    axis = spec.channel_axis
    shape = [1] * len(source.meta["val"].shape)
    shape[axis] = -1
    with torch.no_grad():
        # The quantizer's own output decides, so that learned rounding is kept to the last bit.
        rounded = quantizer(tensor_at(module, path).detach())
        scale = quantizer.scale.detach().clone()
    # A layer whose bias needs coarser weights gets a copy; a shared weight would lose precision for other layers.
    made: list[tuple[object, Tensor, Node]] = []
    for user in list(node.users):
        wide = torch.maximum(scale, _needed_scale(module, user, scale, quantizers))
        # Without a row in the op table there is no kernel: the op multiplies in float.
        form = dequantize_channels if rule_of(user) is not None else stored_channels
        weight = next((known for kind, steps, known in made if kind is form and torch.equal(steps, wide)), None)
        if weight is None:
            integers = torch.round(rounded / wide.reshape(shape)).to(torch.int8)
            with module.graph.inserting_before(node):
                weight = _dequantized(module, path, integers, wide, axis)
            weight.target, weight.meta = form, dict(node.meta)
            made.append((form, wide, weight))
        user.replace_input_with(node, weight)
        _lower_bias(module, user, wide, quantizers)
    module.graph.erase_node(node)


def _bias_of(user: Node, quantizers: dict[Node, FakeQuantize]) -> tuple[Node, Tensor] | None:
    """Return the bias node of a weighted op and the scale of its input, None without a bias or a quantized input."""
    rule = rule_of(user)
    bias = user.args[rule.bias] if rule is not None and rule.bias is not None and len(user.args) > rule.bias else None
    source = user.args[0]
    if not isinstance(bias, Node) or not is_constant(bias) or not isinstance(source, Node) or source not in quantizers:
        return None
    return bias, quantizers[source].scale.detach()


def _needed_scale(module: GraphModule, user: Node, scale: Tensor, quantizers: dict[Node, FakeQuantize]) -> Tensor:
    """Return the smallest weight scale with which a reader's bias fits int32, 0 where it has none.

    Batch-norm folding leaves channels with weights near zero and a bias of normal size, whose bias would overflow on
    the weight's own grid. Coarser weights cost nothing there: the bias is 2^15 times anything they can add.
    """
    known = _bias_of(user, quantizers)
    if known is None:
        return torch.zeros_like(scale)
    bias, input_scale = known
    needed = tensor_at(module, str(bias.target)).detach().abs() / (input_scale * INT32_LIMIT)
    return needed.to(scale.dtype)


def _lower_bias(module: GraphModule, user: Node, scale: Tensor, quantizers: dict[Node, FakeQuantize]) -> None:
    known = _bias_of(user, quantizers)
    rule = rule_of(user)
    if known is None or rule is None or rule.bias is None:
        return
    bias, input_scale = known
    step = input_scale * scale
    integers = torch.round(tensor_at(module, str(bias.target)).detach() / step).to(torch.int32)
    with module.graph.inserting_before(user):
        dequantized = _dequantized(module, str(bias.target), integers, step, 0)
    dequantized.meta = dict(bias.meta)
    user.args = (*user.args[: rule.bias], dequantized, *user.args[rule.bias + 1 :])


def _dequantized(module: GraphModule, path: str, integers: Tensor, scale: Tensor, axis: int) -> Node:
    q = _buffer(module, f"{path}_q", integers)
    steps = _buffer(module, f"{path}_scale", scale)
    return module.graph.create_node(
        "call_function", dequantize_channels, (q, steps, axis), name=f"{path.replace('.', '_')}_dq"
    )


def _buffer(module: GraphModule, path: str, tensor: Tensor) -> Node:
    """Register a buffer under the first free name that starts with `path` and return a node that reads it."""
    *parents, leaf = path.split(".")
    holder: nn.Module = module.get_submodule(".".join(parents))
    free, number = leaf, 1
    while hasattr(holder, free):
        free, number = f"{leaf}_{number}", number + 1
    holder.register_buffer(free, tensor.contiguous())
    node = module.graph.get_attr(".".join([*parents, free]))
    node.meta["val"] = tensor
    return node
