"""Products with a parameter, in any of their spellings, as the linear layers that they are."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant.core.ir import arguments, is_constant, shape_of, sizes, trace

aten = torch.ops.aten

RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
REPEATS = (*RESHAPES, aten.expand.default, aten.clone.default, aten.unsqueeze.default)
"""Ops that repeat a matrix for every image as long as they leave its two axes as they are."""


def as_linear(module: GraphModule, node: Node) -> int:
    """Rewrite `x W`, `b + x W` and a product with W repeated for every image as `linear(x, W', b)`; return how many.

    Rows that were gathered in front of the product and are spread again behind it are left where they came from; a
    vector that is added to nothing but the product is its bias.
    """
    if node.target is aten.add.Tensor:
        return _as_bias(node)
    if node.target is aten.einsum.default:
        return _contraction(module, node)
    found = _operands(node)
    if found is None:
        return 0
    x, matrix, bias = found
    weight = _parameter(matrix)
    if weight is None or is_constant(x) or len(shape_of(x)) < 2 or sizes(node)[:-1] != sizes(x)[:-1]:
        return 0
    constant, turned = weight
    if not turned:
        with module.graph.inserting_before(node):
            constant = trace(module.graph.call_function(aten.t.default, (constant,)))
    node.target, node.args, node.kwargs = aten.linear.default, (x, constant, *bias), {}
    _leave_rows(node)
    return 1


def _contraction(module: GraphModule, node: Node) -> int:
    """Rewrite `einsum("..i..,oi->..o..", x, W)`, the letters in any order in W, as a linear layer along that axis."""
    equation, operands = node.args[:2]
    ends = str(equation).replace(" ", "").split("->")
    letters = ends[0].split(",")
    if len(ends) != 2 or len(letters) != 2 or not isinstance(operands, list | tuple):
        return 0
    # The parameter may be either factor.
    (of_x, x), (of_matrix, matrix) = sorted(
        zip(letters, operands, strict=True), key=lambda factor: _parameter(factor[1]) is not None
    )
    weight = _parameter(matrix)
    summed = [letter for letter in of_matrix if letter in of_x]
    made = [letter for letter in of_matrix if letter not in of_x]
    if weight is None or is_constant(x) or len(summed) != 1 or len(made) != 1 or of_x.count(summed[0]) != 1:
        return 0
    # Axes are counted from the end, so dots must come first.
    if ends[1] != of_x.replace(summed[0], made[0]) or of_x.index(summed[0]) < of_x.rfind("."):
        return 0
    constant, turned = weight
    axis = of_x.index(summed[0]) - len(of_x)
    with module.graph.inserting_before(node):
        if turned == (of_matrix == f"{made[0]}{summed[0]}"):
            constant = trace(module.graph.call_function(aten.t.default, (constant,)))
        if axis == -1:
            node.target, node.args = aten.linear.default, (x, constant)
            return 1
        last = trace(module.graph.call_function(aten.transpose.int, (x, axis, -1)))
        linear = trace(module.graph.call_function(aten.linear.default, (last, constant)))
    linear.meta |= {key: value for key, value in node.meta.items() if key != "val"}
    node.target, node.args = aten.transpose.int, (linear, axis, -1)
    return 1


def _operands(node: Node) -> tuple[Node, Node, tuple[Node, ...]] | None:
    """Return both factors of a product, and the vector that is added to it."""
    if node.target in (aten.matmul.default, aten.bmm.default):
        x, matrix = node.args[:2]
        assert isinstance(x, Node)
        assert isinstance(matrix, Node)
        return x, matrix, ()
    if node.target is not aten.addmm.default:
        return None
    given = arguments(node)
    bias, x, matrix = (given[name] for name in ("self", "mat1", "mat2"))
    return (x, matrix, (bias,)) if given["alpha"] == given["beta"] == 1 and _is_bias(bias, node) else None


def _is_bias(bias: object, product: Node) -> bool:
    return is_constant(bias) and shape_of(bias) == shape_of(product)[-1:]


def _parameter(matrix: Node) -> tuple[Node, bool] | None:
    """Return the parameter that a matrix, or a matrix for every image, shows, and whether it is turned."""
    turned = False
    while not is_constant(matrix):
        source = matrix.args[0] if matrix.args else None
        if not isinstance(source, Node):
            return None
        if _turns(matrix):
            turned = not turned
        elif matrix.target not in REPEATS or shape_of(source)[-2:] != shape_of(matrix)[-2:]:
            return None
        matrix = source
    return (matrix, turned) if len(shape_of(matrix)) == 2 else None


def _turns(node: Node) -> bool:
    """Whether a node exchanges the two last axes of a matrix and does nothing else."""
    rank = len(shape_of(node))
    pairs: dict[object, tuple[Any, ...]] = {aten.t.default: (0, 1), aten.transpose.int: node.args[1:3]}
    axes = pairs.get(node.target)
    if axes is not None:
        return rank >= 2 and {axis % rank for axis in axes} == {rank - 2, rank - 1}
    order: Any = node.args[1] if node.target is aten.permute.default else None
    if not isinstance(order, list | tuple) or rank < 2:
        return False
    return [axis % rank for axis in order] == [*range(rank - 2), rank - 1, rank - 2]


def _leave_rows(linear: Node) -> None:
    """Take the rows of `reshape(linear(reshape(x)))` where they come from if they go back to the same places."""
    gathered, readers = linear.args[0], list(linear.users)
    if not isinstance(gathered, Node) or gathered.target not in RESHAPES or len(readers) != 1:
        return
    source, spread = gathered.args[0], readers[0]
    if not isinstance(source, Node) or spread.target not in RESHAPES or len(shape_of(gathered)) != 2:
        return
    if shape_of(source)[-1] != shape_of(gathered)[-1] or sizes(spread) != (*sizes(source)[:-1], shape_of(linear)[-1]):
        return
    linear.args = (source, *linear.args[1:])
    linear.meta = {**linear.meta, "val": spread.meta["val"]}
    spread.replace_all_uses_with(linear)
    linear.graph.erase_node(spread)


def _as_bias(added: Node) -> int:
    given = arguments(added)
    for product, bias in ((given["self"], given["other"]), (given["other"], given["self"])):
        if not isinstance(product, Node) or product.target is not aten.linear.default or len(product.args) != 2:
            continue
        if len(product.users) == 1 and given["alpha"] == 1 and _is_bias(bias, product):
            product.args = (*product.args, bias)
            added.replace_all_uses_with(product)
            added.graph.erase_node(added)
            return 1
    return 0
