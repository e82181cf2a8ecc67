"""Which elements of which values can take a common factor without changing what the network computes.

The graph is run once on real images, and beside every value on the numbers of the factors that its elements carry.
Number 0 is the factor 1, and -1 marks zeros, to which every factor applies. A layer with weights gives each of its
output channels a new number and asks that all elements of an input channel have one; ops that move values move their
numbers; sums make the numbers of their operands equal; whatever the table does not know asks for the factor 1.
Numbers that must be equal end up in one class, by union and find.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Interpreter, Node

from fxquant.core.ir import arguments, is_constant, rule_of, tensor_at
from fxquant.passes.equalization.factor_classes import ANY, ONE, Classes, compact
from fxquant.passes.equalization.factor_ops import ELEMENTWISE, NORMALIZATIONS, REDUCTIONS, RESAMPLES, moves
from fxquant.passes.rounding.closed_form.input_gram import channel_axis, geometry_of

aten = torch.ops.aten


@dataclass(frozen=True)
class ChannelFactors:
    """The classes of elements that share a factor, by value and by parameter.

    Args:
        count: number of classes; class 0 has the factor 1.
        values: node name -> class of each element, of a shape that broadcasts to the value's.
        parameters: attribute path -> classes that multiply it and classes that divide it, of shapes that broadcast to
            the parameter's; `None` for neither.
    """

    count: int
    values: dict[str, Tensor] = field(repr=False)
    parameters: dict[str, tuple[Tensor | None, Tensor | None]] = field(repr=False)


def channel_factors(module: GraphModule, inputs: tuple[Tensor, ...]) -> ChannelFactors:
    """Return which elements of a network's values share a factor, all others having the factor 1.

    Args:
        module: graph of ATen ops, without observers and quantizers.
        inputs: images to run, one tensor for each placeholder.
    """
    flow = _FactorFlow(module)
    with torch.no_grad():
        flow.run(*inputs)
    return flow.found()


class _FactorFlow(Interpreter):
    """Runs a graph with the numbers of factors beside its values."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._classes = Classes()
        self._numbers: dict[Node, Any] = {}
        #: storage of a parameter -> what it is used as, its numbers as a factor and as a divisor
        self._used: dict[tuple[object, ...], tuple[str, Tensor, Tensor | None]] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        numbers = self._step(n, value) if n.op == "call_function" else None
        if n.op == "output":
            self._fix(n)
        if numbers is not None:
            self._numbers[n] = _each(numbers, lambda one: compact(one).expand_as(one))
        return value

    def found(self) -> ChannelFactors:
        """Return the classes, numbered without gaps; call it after the run."""
        roots = self._classes.roots()
        known, dense = np.unique(roots, return_inverse=True)

        def of(numbers: Tensor) -> Tensor:
            flat = compact(numbers).to(torch.int64)
            return torch.where(flat < 0, ONE, torch.from_numpy(dense)[flat.clamp(min=0)])

        values = {n.name: of(each) for n, each in self._numbers.items() if isinstance(each, Tensor)}
        parameters = {}
        for node in (each for each in self.graph.nodes if is_constant(each)):
            use = self._used.get(_storage(self._tensor(node)))
            if use is not None:
                over, under = (None if each is None else of(each) for each in use[1:])
                parameters[str(node.target)] = (over, under)
        return ChannelFactors(len(known), values, parameters)

    # How each kind of op treats factors

    def _step(self, node: Node, value: Any) -> Any:
        rule = rule_of(node)
        handlers: tuple[tuple[bool, Callable[..., Any]], ...] = (
            (rule is not None and rule.weight is not None, self._weighted),
            (node.target in RESAMPLES, self._resample),
            (node.target in REDUCTIONS, self._reduce),
            (node.target in NORMALIZATIONS, self._normalize),
            (node.target in (aten.add.Tensor, aten.sub.Tensor), self._sum),
            (node.target in (aten.mul.Tensor, aten.div.Tensor), self._product),
            (node.target in (aten.matmul.default, aten.bmm.default), self._matmul),
            (node.target is aten.scaled_dot_product_attention.default, self._attention),
            (node.target is aten.embedding.default, self._table),
            (node.target in ELEMENTWISE or (rule is not None and rule.homogeneous), self._pass),
            (moves(node, rule), self._move),
        )
        # Images of bytes, indices and masks have no factors, whatever moves them.
        floating = all(each.is_floating_point() for each in _leaves(value))
        handler = next((handler for applies, handler in handlers if applies and floating), None)
        numbers = None if handler is None else handler(node, value)
        if numbers is None:
            self._fix(node)
            numbers = _each(value, _ones)
        return numbers

    def _weighted(self, node: Node, value: Tensor) -> Tensor | None:
        rule = rule_of(node)
        assert rule is not None
        assert rule.weight is not None
        x, weight = node.args[0], node.args[rule.weight]
        bias = node.args[rule.bias] if rule.bias is not None and len(node.args) > rule.bias else None
        if not is_constant(weight) or not (bias is None or is_constant(bias)) or not isinstance(x, Node):
            return None
        tensor, groups = self._tensor(weight), geometry_of(node).groups
        rows, columns = tensor.shape[:2]
        axes = [1] * (tensor.dim() - 2)
        found = self._parameter(
            weight,
            "weight",
            lambda: (self._classes.new(rows).reshape(-1, 1, *axes), self._classes.new(groups * columns)),
        )
        if found is None or (under := found[1]) is None:
            return None
        if under.dim() == 1:
            # Row o of a group reads that group's input channels.
            spread = under.reshape(groups, 1, columns).expand(groups, rows // groups, columns)
            under = (spread[:1, :1] if groups == 1 else spread).reshape(-1, columns, *axes)
            self._used[_storage(tensor)] = ("weight", found[0], under)
        given = self._of(x)
        along = channel_axis(given.dim(), node)
        read = (under[:1] if groups == 1 else under.reshape(groups, -1, columns)[:, 0]).flatten()
        shape = [1] * given.dim()
        shape[along] = -1
        self._classes.join(given, read.reshape(shape))
        out = found[0].flatten()
        if bias is not None:
            held = self._parameter(bias, "elements", lambda: (self._classes.new(rows), None))
            self._classes.join(out, torch.zeros(1) if held is None else held[0])
        shape = [1] * value.dim()
        shape[channel_axis(value.dim(), node)] = -1
        return out.reshape(shape).expand(value.shape)

    def _normalize(self, node: Node, value: Any) -> Any:
        given = arguments(node)
        weight, bias = given.get("weight"), given.get("bias")
        held = [each for each in (weight, bias) if isinstance(each, Node)]
        if not isinstance(weight, Node) or not all(is_constant(each) for each in held):
            return None
        self._fix(node, but=held)
        numbers = [self._elements(each) for each in held]
        for each in numbers[1:]:
            self._classes.join(numbers[0], each)
        made = value if isinstance(value, Tensor) else value[0]
        axis = NORMALIZATIONS[node.target]
        shape = list(numbers[0].shape) if axis is None else [-1, *[1] * (made.dim() - 1 - axis)]
        out = numbers[0].reshape(shape).expand(made.shape)
        return out if isinstance(value, Tensor) else (out, *(_each(other, _ones) for other in value[1:]))

    def _table(self, node: Node, value: Tensor) -> Tensor | None:
        table = node.args[0]
        if not is_constant(table):
            return None
        columns = self._tensor(table).shape[1]
        found = self._parameter(table, "elements", lambda: (self._classes.new(columns).reshape(1, -1), None))
        if found is None:
            return None
        rows = found[0].expand(self._tensor(table).shape)
        return self._joined(rows, 0)[0].expand(value.shape)

    def _sum(self, node: Node, value: Tensor) -> Tensor | None:
        left, right = (self._operand(each) for each in node.args[:2])
        if left is None or right is None:
            return None
        self._classes.join(left, right)
        left, right = left.expand(value.shape), right.expand(value.shape)
        return torch.where(left == ANY, right, left)

    def _product(self, node: Node, value: Tensor) -> Tensor | None:
        left, right = (self._operand(each) for each in node.args[:2])
        divides = node.target is aten.div.Tensor
        if left is None or right is None:
            # With a number, the product is as it was up to that factor.
            shown = right if left is None and not divides else left
            return None if shown is None else shown.expand(value.shape)
        # Factors of both operands would be a factor of two classes.
        if divides or not self._classes.is_one(left):
            self._classes.join(right, torch.zeros(1))
            return left.expand(value.shape)
        return right.expand(value.shape)

    def _matmul(self, node: Node, value: Tensor) -> Tensor | None:
        left, right = node.args[:2]
        if not isinstance(left, Node) or not isinstance(right, Node) or is_constant(left) or is_constant(right):
            return None
        return self._mixed(left, right, value)

    def _attention(self, node: Node, value: Tensor) -> Tensor | None:
        given = arguments(node)
        for name in ("query", "key", "attn_mask"):
            if isinstance(given[name], Node):
                self._classes.join(self._of(given[name]), torch.zeros(1))
        return self._mixed(None, given["value"], value) if isinstance(given["value"], Node) else None

    def _mixed(self, weights: Node | None, right: Node, value: Tensor) -> Tensor | None:
        """Return the numbers of `weights @ right`: columns keep their factors, rows have one that all share."""
        if weights is not None:
            self._classes.join(self._of(weights), torch.zeros(1))
        numbers = self._of(right)
        if numbers.dim() < 2:
            return None
        first = self._joined(numbers, -2)
        if numbers.dim() < value.dim():
            first = first.reshape([1] * (value.dim() - numbers.dim()) + list(first.shape))
        # Heads that share keys and values repeat them.
        return first.expand(value.shape) if _broadcasts(first, value) else None

    def _pass(self, node: Node, value: Tensor) -> Tensor | None:
        for other in node.all_input_nodes[1:]:
            if not is_constant(other):
                return None
        return self._of(node.all_input_nodes[0]).expand(value.shape)

    def _resample(self, node: Node, value: Any) -> Any:
        numbers = self._of(node.all_input_nodes[0])
        made = value if isinstance(value, Tensor) else value[0]
        spatial = 1 if "1d" in str(node.target) else 2
        for axis in range(numbers.dim() - spatial, numbers.dim()):
            numbers = self._joined(numbers, axis)
        out = numbers.expand(made.shape)
        return out if isinstance(value, Tensor) else (out, *(_each(other, _ones) for other in value[1:]))

    def _reduce(self, node: Node, value: Tensor) -> Tensor | None:
        given, numbers = arguments(node), self._of(node.all_input_nodes[0])
        axes = given["dim"] or range(numbers.dim())
        for axis in axes if isinstance(axes, list | tuple | range) else (axes,):
            numbers = self._joined(numbers, axis)
        return numbers.reshape(value.shape) if numbers.numel() == value.numel() else None

    def _move(self, node: Node, value: Any) -> Any:
        del value
        padded = isinstance(node.target, OpOverload) and "value" in arguments(node)

        def numbers_of(source: Node) -> Any:
            return self._numbers[source] if source in self._numbers else self._value_or_numbers(source)

        args = torch.fx.map_arg(node.args, numbers_of)
        kwargs: dict[str, Any] = dict(torch.fx.map_arg(node.kwargs, numbers_of))
        if padded:
            # Zeros may have any factor.
            names = list(arguments(node))
            args, kwargs = args[: names.index("value")], {**kwargs, "value": float(ANY)}
        assert callable(node.target)
        try:
            return node.target(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError):
            # An op that does not take float64 moves nothing here; its inputs get the factor 1.
            return None

    # Numbers of operands and parameters

    def _joined(self, numbers: Tensor, axis: int) -> Tensor:
        """Make the numbers along an axis one, and return it with that axis of length 1."""
        if not numbers.shape[axis]:
            shape = list(numbers.shape)
            shape[axis] = 1
            return torch.full(shape, float(ANY), dtype=numbers.dtype)
        # The largest: zeros that may have any factor say nothing of the others.
        shown = numbers.amax(dim=axis, keepdim=True)
        self._classes.join(numbers, shown)
        return shown

    def _of(self, node: Node) -> Tensor:
        """Return the numbers of a value; parameters that an op reads as a value have one for every element."""
        known = self._numbers.get(node)
        if isinstance(known, Tensor):
            return known
        return self._elements(node) if is_constant(node) else _ones(self.env[node])

    def _operand(self, operand: object) -> Tensor | None:
        """Return the numbers of an operand of arithmetic, None for one that is no tensor."""
        known = isinstance(operand, Node) and isinstance(self.env[operand], Tensor)
        return self._of(operand) if known and isinstance(operand, Node) else None

    def _value_or_numbers(self, node: Node) -> Any:
        value = self.env[node]
        moves = isinstance(value, Tensor) and value.is_floating_point()
        return self._of(node) if moves else value

    def _elements(self, node: Node) -> Tensor:
        tensor = self._tensor(node)
        found = self._parameter(
            node, "elements", lambda: (self._classes.new(tensor.numel()).reshape(tensor.shape), None)
        )
        return _ones(tensor) if found is None else found[0].expand(tensor.shape)

    def _parameter(
        self, node: object, use: str, make: Callable[[], tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return the numbers of a parameter used in one way; None, and the factor 1, where it is used in several."""
        tensor = self._tensor(node)
        if tensor.dtype != torch.float32:
            return None
        key = _storage(tensor)
        if key not in self._used:
            self._used[key] = (use, *make())
        known, over, under = self._used[key]
        if known == use:
            return over, under
        for each in (over, under):
            if each is not None:
                self._classes.join(each, torch.zeros(1))
        return None

    def _tensor(self, node: object) -> Tensor:
        assert isinstance(node, Node)
        return tensor_at(self.module, str(node.target)).detach()

    def _fix(self, node: Node, but: Sequence[Node] = ()) -> None:
        """Give everything that a node reads the factor 1, but some of it."""
        for source in (each for each in node.all_input_nodes if each not in but):
            for numbers in _leaves(self._numbers.get(source)):
                self._classes.join(numbers, torch.zeros(1))
            if is_constant(source):
                use = self._used.setdefault(_storage(self._tensor(source)), ("fixed", torch.zeros(1), None))
                for each in use[1:]:
                    if isinstance(each, Tensor):
                        self._classes.join(each, torch.zeros(1))


def _storage(tensor: Tensor) -> tuple[object, ...]:
    """Return what tells tensors that share their memory; parameters of two names may be one."""
    return (tensor.data_ptr() if tensor.numel() else id(tensor), tensor.shape, tensor.stride())


def _broadcasts(numbers: Tensor, value: Tensor) -> bool:
    pairs = zip(reversed(numbers.shape), reversed(value.shape), strict=False)
    return numbers.dim() <= value.dim() and all(have in (1, want) for have, want in pairs)


def _ones(value: Any) -> Any:
    return torch.zeros((), dtype=torch.float64).expand(value.shape) if isinstance(value, Tensor) else None


def _each(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return the structure with the function of each tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_each(one, function) for one in value) if type(value) in (tuple, list) else None


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for one in value for leaf in _leaves(one)] if isinstance(value, list | tuple) else []
