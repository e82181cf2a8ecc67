"""Products with a parameter, in any of their spellings, as the linear layers that they are."""

from __future__ import annotations

from collections.abc import Callable
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
    if node.target is aten.baddbmm.default:
        return _apart(module, node)
    if node.target is aten.bilinear.default:
        return _first_factor(node)
    found = _operands(node)
    if found is None:
        return 0
    x, matrix, bias = found
    weight = _parameter(matrix)
    if weight is None or is_constant(x) or len(shape_of(x)) < 2 or sizes(node)[:-1] != sizes(x)[:-1]:
        return 0
    constant, turned = weight
    constant = _matrix(node, constant)
    if not turned:
        constant = _before(node, aten.t.default, constant)
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
    constant = _matrix(node, constant)
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


def _apart(module: GraphModule, node: Node) -> int:
    """Rewrite `beta b + alpha x y` as a product, which may be a linear layer, and a sum."""
    given = arguments(node)
    product = _before(node, aten.matmul.default, given["batch1"], given["batch2"])
    as_linear(module, product)
    if given["alpha"] != 1:
        product = _before(node, aten.mul.Tensor, product, given["alpha"])
    # With beta = 0 even what is not finite in b is ignored.
    if given["beta"] == 0:
        node.replace_all_uses_with(product)
        node.graph.erase_node(node)
        return 1
    added = given["self"] if given["beta"] == 1 else _before(node, aten.mul.Tensor, given["self"], given["beta"])
    node.target, node.args, node.kwargs = aten.add.Tensor, (product, added), {}
    _as_bias(node)
    return 1


def _first_factor(node: Node) -> int:
    """Rewrite a bilinear layer `y_o = x' W_o z + b_o` as a linear layer of x, whose rows are then multiplied by z.

    The linear layer, with a row for every o and element of z, reads the wider input and does nearly all of the work.
    """
    given = arguments(node)
    inputs, weight = [given["input1"], given["input2"]], given["weight"]
    # Sizes in the middle have to be known to name the new shape.
    middle = list(node.meta["val"].shape[1:-1])
    if not is_constant(weight) or any(map(is_constant, inputs)) or not all(isinstance(size, int) for size in middle):
        return 0
    if len(shape_of(node)) < 2:
        return 0
    outputs, one, other = shape_of(weight)
    if one >= other:
        inputs.reverse()
        weight = _before(node, aten.permute.default, weight, [0, 2, 1])
    narrow, wide = inputs
    rows = shape_of(weight)[1]
    matrix = _before(node, aten.reshape.default, weight, [outputs * rows, shape_of(weight)[2]])
    linear = _before(node, aten.linear.default, wide, matrix)
    each = _before(node, aten.reshape.default, linear, [-1, *middle, outputs, rows])
    column = _before(node, aten.unsqueeze.default, narrow, -1)
    product = _before(node, aten.matmul.default, each, column)
    last: tuple[Callable[..., Any], tuple[Any, ...]] = (aten.squeeze.dim, (product, -1))
    if given["bias"] is not None:
        last = aten.add.Tensor, (_before(node, *last[:1], *last[1]), given["bias"])
    node.target, node.args, node.kwargs = *last, {}
    return 1


def _before(node: Node, target: Callable[..., Any], *operands: Any) -> Node:
    """Insert an op in front of a node, with its origin, and return it, traced."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, operands)
    made.meta = {key: value for key, value in node.meta.items() if key != "val"}
    return trace(made)


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
    shape = shape_of(matrix)
    return (matrix, turned) if len(shape) >= 2 and set(shape[:-2]) <= {1} else None


def _matrix(node: Node, constant: Node) -> Node:
    """Return a parameter of one matrix as that matrix."""
    shape = list(shape_of(constant))
    return constant if len(shape) == 2 else _before(node, aten.reshape.default, constant, shape[-2:])


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
