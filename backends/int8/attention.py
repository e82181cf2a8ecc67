"""Attention written out as two products and a softmax, given back to PyTorch's fused kernel.

Capturing takes attention apart so that the edges of every product can be quantized. Where the plan leaves them in
float, one fused call reads keys and values once and never writes the attention matrix to memory.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten

STANDS_FOR = "stands_for"
"""Key of a node's meta: names of the nodes it took the place of."""

LAST_TWO = ({-2, -1}, {2, 3})
"""Axes of a transposition of keys `(N, heads, tokens, width)`."""


def fuse_attention(module: GraphModule) -> int:
    """Replace `softmax(a q k') v` by one fused call in place wherever nothing else reads what lies between.

    Returns:
        the number of attentions fused.
    """
    found = 0
    for node in list(module.graph.nodes):
        if node.target is aten.matmul.default and _fuse(module, node):
            found += 1
    if found:
        module.graph.eliminate_dead_code()
    return found


def _fuse(module: GraphModule, product: Node) -> bool:
    weights, values = product.args
    if not _is_softmax(weights) or not isinstance(values, Node):
        return False
    scores, factor = _scaled(weights.args[0])
    if scores is None or scores.target is not aten.matmul.default or len(scores.users) != 1:
        return False
    if len(weights.all_input_nodes[0].users) != 1:
        return False
    queries, turned = scores.args
    queries, of_queries = _scaled(queries)
    if not isinstance(turned, Node) or turned.target is not aten.transpose.int or set(turned.args[1:]) not in LAST_TWO:
        return False
    if any(_rank(operand) != 4 for operand in (queries, turned, values)):
        return False
    with module.graph.inserting_before(product):
        fused = module.graph.call_function(
            aten.scaled_dot_product_attention.default, (queries, turned.args[0], values), {"scale": factor * of_queries}
        )
    fused.meta = {**product.meta, STANDS_FOR: (scores.name, product.name)}
    product.replace_all_uses_with(fused)
    return True


def _is_softmax(node: object) -> TypeGuard[Node]:
    if not isinstance(node, Node) or node.target is not aten.softmax.int or len(node.users) != 1:
        return False
    return len(node.args) == 2 and node.args[1] in (-1, 3) and not node.kwargs


def _scaled(node: object) -> tuple[Node | None, float]:
    """Return a value before a constant factor that nothing else reads, and the factor."""
    if not isinstance(node, Node):
        return None, 1.0
    if node.target is aten.mul.Tensor and len(node.users) == 1:
        value, factor = node.args
        if isinstance(value, Node) and isinstance(factor, int | float):
            return value, float(factor)
    return node, 1.0


def _rank(node: object) -> int:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else 0
