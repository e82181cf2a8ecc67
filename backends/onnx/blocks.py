"""Linear layers with one weight scale per block of inputs, in the form that ONNX Runtime fuses to MatMulNBits.

Measured here (onnxruntime 1.31, one thread): a product of one row and 4-bit blocks takes 0.7 to 0.9 of the time of the
integer product with one scale per channel, of eight rows 1.3 to 1.6, of 197 rows 2.7 to 3.6 times. So this is for
classifiers at batch 1, and never chosen unasked.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from fxquant.core.errors import LoweringError, OptionError
from fxquant.core.ir import (
    OPS,
    FakeQuantize,
    Grid,
    ScaleRule,
    erase_dead,
    finish,
    fork,
    is_constant,
    site_name,
    tensor_at,
)

aten = torch.ops.aten

WIDEST = 4
"""Bits from which on a block scale gains neither time nor bytes."""


def block_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, block: int, bits: int) -> Tensor:
    """Return `x (q * s) + bias`, where row k of q has the scales `scale[k // block]`.

    Args:
        x: float `(..., K)`.
        q: int8 `(K, N)` on a grid of `bits`.
        scale: float `(ceil(K / block), N)`.
        bias: float `(N,)` or None.
        block: inputs per scale.
        bits: width the weights are stored in; arithmetic ignores it.
    """
    del bits
    weight = q.float() * scale.repeat_interleave(block, 0)[: len(q)]
    y = x @ weight
    return y if bias is None else y + bias


def block_weights(weight: Tensor, block: int, bits: int) -> tuple[Tensor, Tensor]:
    """Return integers and scales of a weight, each block on the grid of least squared error.

    Args:
        weight: float `(N, K)`.
        block: inputs per scale.
        bits: width of the grid.

    Returns:
        int8 `(K, N)` and float32 `(ceil(K / block), N)`.
    """
    rows, inputs = weight.shape
    padded = functional.pad(weight.detach().float(), [0, -inputs % block]).reshape(-1, block)
    grid = Grid.of_weight(padded, bits)
    q = grid.quantize(padded).reshape(rows, -1)[:, :inputs]
    return q.T.to(torch.int8).contiguous(), grid.scale.reshape(rows, -1).T.contiguous()


def to_blocks(module: GraphModule, patterns: Sequence[str], block: int) -> tuple[GraphModule, tuple[str, ...]]:
    """Return a simulated graph with the named linear layers on blocks, and their names.

    Their float weights are rounded again: blocks are finer than channels, so the squared error of a layer's weights
    does not grow. Their inputs stay float, unless an integer kernel makes them.

    Args:
        module: a simulated graph; it is not changed.
        patterns: shell patterns of layer names.
        block: inputs per scale.

    Raises:
        OptionError: a pattern fits no linear layer of at most 4 bits whose inputs fill two blocks or more.
    """
    made, names, used = fork(module), list[str](), set[str]()
    fitting = dict[str, Node]()
    for node in made.graph.nodes:
        grid = _grid(made, node)
        # The standard allows a last block that is not full; OpenVINO refuses it. One block alone is not fused.
        inputs = grid[0].meta["val"].shape[1] if grid is not None else 0
        if grid is not None and inputs > block and inputs % block == 0 and grid[1].spec.bits <= WIDEST:
            fitting[site_name(str(grid[0].target))] = node
    for name, node in fitting.items():
        hits = {pattern for pattern in patterns if fnmatchcase(name, pattern)}
        used |= hits
        if hits:
            names.append(name)
            _replace(made, node, block)
    for pattern in patterns:
        if pattern not in used:
            raise OptionError(
                f"weight_only={pattern!r} names no linear layer of at most {WIDEST} bits with several times {block} "
                f"inputs; there are: {', '.join(sorted(fitting)) or 'none'}"
            )
    erase_dead(made)
    return finish(made), tuple(names)


def _grid(module: GraphModule, node: Node) -> tuple[Node, FakeQuantize] | None:
    """Return the weight of a linear layer and its quantizer."""
    call = node.args[1] if node.target is aten.linear.default else None
    if not isinstance(call, Node) or call.op != "call_module" or not is_constant(call.args[0]):
        return None
    quantizer, weight = module.get_submodule(str(call.target)), call.args[0]
    assert isinstance(weight, Node)
    return (weight, quantizer) if isinstance(quantizer, FakeQuantize) else None


def _replace(module: GraphModule, node: Node, block: int) -> None:
    found = _grid(module, node)
    if found is None:
        raise LoweringError(f"{node.name} is no linear layer with a weight grid")
    weight, quantizer = found
    path, bits = str(weight.target), quantizer.spec.bits
    q, scale = block_weights(tensor_at(module, path), block, bits)
    name = path.replace(".", "_")
    with module.graph.inserting_before(node):
        constants = []
        for label, tensor in ((f"{name}_blocks", q), (f"{name}_block_scales", scale)):
            module.register_buffer(label, tensor)
            constants.append(module.graph.get_attr(label))
            constants[-1].meta["val"] = tensor
        bias = node.args[2] if len(node.args) > 2 else None
        made = module.graph.call_function(block_linear, (_input(module, node), *constants, bias, block, bits))
    made.meta = {**node.meta, "layer": site_name(path)}
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)


def _input(module: GraphModule, node: Node) -> Node:
    """Return the float in front of the layer's quantizer; the quantized value where an integer kernel makes it."""
    call = node.args[0]
    assert isinstance(call, Node)
    if call.op != "call_module" or not isinstance(module.get_submodule(str(call.target)), FakeQuantize):
        return call
    source = call.args[0]
    assert isinstance(source, Node)
    maker = source
    while (rule := OPS.get(maker.target)) is not None and rule.scale is ScaleRule.KEEP:
        assert isinstance(maker.args[0], Node)
        maker = maker.args[0]
    return source if rule is None or rule.scale is ScaleRule.FLOAT else call
