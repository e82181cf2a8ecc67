"""Rewrites of an explicit integer graph that OpenVINO needs to read it right."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fxquant.backends.onnx.rewrites import CONVS, argument, padded_conv
from fxquant.backends.qdq_ops import dequantize_channels
from fxquant.core.errors import LoweringError
from fxquant.core.ir import constant, erase_dead, finish

aten = torch.ops.aten

BIASED = (*CONVS, aten.conv1d.padding, aten.conv2d.padding, padded_conv)
"""Convolutions; their bias is the third argument."""


def add_biases(module: GraphModule) -> GraphModule:
    """Add the bias of each integer convolution in a separate node, in place, and return the module.

    OpenVINO 2026.4 loses a bias given to Conv itself where the quantized output goes to a float operator (DeiT's patch
    embedding: answers wrong by 10 of a range of 14). Written as an addition it is kept, at the same speed.

    Raises:
        LoweringError: a bias is no constant.
    """
    for node in list(module.graph.nodes):
        bias = argument(node, 2, None) if node.target in BIASED else None
        if isinstance(bias, Node) and bias.target is dequantize_channels:
            _add(module, node, bias)
    erase_dead(module)
    return finish(module)


def _add(module: GraphModule, conv: Node, bias: Node) -> None:
    integers, scale = (constant(module, source) for source in bias.args[:2])
    if integers is None or scale is None:
        raise LoweringError(f"the bias of {conv.name} must be a constant of the graph")
    values = (integers.float() * scale).reshape(1, -1, *[1] * (conv.meta["val"].dim() - 2))
    name = f"{conv.name}_bias"
    while hasattr(module, name):
        name = f"{name}_1"
    module.register_buffer(name, values)
    graph = conv.graph
    with graph.inserting_before(conv):
        added = graph.get_attr(name)
        added.meta["val"] = values
    with graph.inserting_after(conv):
        result = graph.call_function(aten.add.Tensor, (conv, added))
    result.meta = dict(conv.meta)
    conv.replace_all_uses_with(result, lambda user: user is not result)
    conv.args = (*conv.args[:2], None, *conv.args[3:])
