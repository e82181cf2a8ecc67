"""What rewrites of layers share: parameters in a new form, and norms and clips moved in front of what moves pixels."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.core.ir import ScaleRule, free_path, is_constant, rule_of, set_parameter, tensor_at, trace

aten = torch.ops.aten

NORM = aten._native_batch_norm_legit_no_training.default
STATISTICS = range(1, 5)
"""Argument positions of what a batch norm knows of each channel."""

SWAP = [0, 2, 1, 3, 4]
"""Exchanges channels and depth of volumes."""

Made = dict[tuple[object, ...], str]
"""Path and form of a parameter -> path of its new form."""


def integers(value: Any, axes: int) -> list[int]:
    """Return a size argument, a number or a list, as one number for each of `axes` axes."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [int(v) for v in (values * axes if len(values) == 1 else values)]


def pays_as_planes(inputs: int, groups: int) -> bool:
    """Return whether a 3-d convolution of so many input channels and groups is faster as a 2-d one on integers.

    ONNX Runtime, 64 channels of 8 x 28 x 28, kernel 3: a float layer takes 4.0 times as long with one group, 2.2 times
    with groups of 16 channels, 1.1 of 8, 0.74 of 4, 0.39 of 2 and 0.17 of 1.
    """
    return groups == 1 or inputs // groups >= 8


class Layer(Protocol):
    """A layer that knows how to take another form."""

    node: Node
    form: tuple[object, ...]

    def rewrite(self, made: Made, leaving: set[Node]) -> None:
        """Replace the layer; `made` and `leaving` are those of `NewForm`."""


def rewrite_all(layers: Iterable[Layer]) -> int:
    """Rewrite layers, those that share a parameter sharing its new form, and return how many there were."""
    found, made = list(layers), Made()
    for layer in found:
        layer.rewrite(made, {other.node for other in found if other.form == layer.form})
    return len(found)


class NewForm:
    """A layer that takes another form.

    Args:
        module: a fork that holds it.
        node: the layer; new nodes come in front of it.
        form: layers of one form that share a parameter share its new form; begins with the new form's name.
        made: parameters that have their new form already; added to.
        leaving: layers of this form, which will not read their parameters any more.
    """

    def __init__(
        self, module: GraphModule, node: Node, form: tuple[object, ...], made: Made, leaving: set[Node]
    ) -> None:
        self.module, self.node, self.form = module, node, form
        self._made, self._leaving = made, leaving

    def insert(self, like: Node, target: Callable[..., Any], operands: Sequence[Any]) -> Node:
        """Insert an op in front of the layer, with the origin of another node, and return it, not yet traced."""
        with self.module.graph.inserting_before(self.node):
            made = self.module.graph.call_function(target, tuple(operands))
        made.meta = {key: value for key, value in like.meta.items() if key != "val"}
        return made

    def op(self, target: Callable[..., Any], *operands: Any) -> Node:
        """Insert an op in front of the layer and return it, traced."""
        return trace(self.insert(self.node, target, operands))

    def change(self, reader: Node, position: int, change: Callable[[Tensor], Tensor], *others: Node) -> None:
        """Let a node read a parameter's new form: in the parameter's place, or beside it where others read that.

        Args:
            reader: reads the parameter.
            position: of the argument; nothing happens if it holds none.
            change: returns the new values.
            others: nodes that will not read the parameter any more either.
        """
        source = reader.args[position]
        if not isinstance(source, Node):
            return
        path, key = str(source.target), (source.target, *self.form)
        tensor = tensor_at(self.module, path)
        known, trainable = self._made.get(key), tensor.requires_grad
        if known is None:
            same = [n for n in self.module.graph.nodes if n.op == "get_attr" and n.target == path]
            alone = {user for n in same for user in n.users} <= {reader, *self._leaving, *others}
            self._made[key] = path if alone else free_path(self.module, f"{path}_{self.form[0]}")
        value = change(tensor.detach()) if known is None else tensor_at(self.module, known).detach()
        set_parameter(self.module, reader, position, self._made[key], value, trainable)

    def moved(self, value: Node, each: Callable[[Tensor], Tensor] | None = None) -> tuple[Node, Node]:
        """Repeat behind `value` what alone follows the layer and treats pixels alike.

        Args:
            value: new layer.
            each: new form of what a batch norm knows of each channel; None if channels stay as they are.

        Returns:
            the value in the new form, and the node that it stands for.
        """
        last = self.node
        while len(last.users) == 1:
            (user,) = last.users
            rule = rule_of(user)
            ends = list(user.users)
            if user.target is NORM and len(ends) == 1 and ends[0].args[1:] == (0,):
                if not all(part is None or is_constant(part) for part in user.args[1:5]):
                    break
                norm = self.insert(user, NORM, (value, *user.args[1:]))
                for position in STATISTICS if each is not None else ():
                    assert each is not None
                    self.change(norm, position, each, user)
                value, last = trace(self.insert(ends[0], operator.getitem, (trace(norm), 0))), ends[0]
            elif rule is not None and rule.scale is ScaleRule.ABSORB and user.all_input_nodes == [last]:
                assert callable(user.target)
                value, last = trace(self.insert(user, user.target, (value, *user.args[1:]))), user
            else:
                break
        return value, last

    def replace(self, last: Node, value: Node) -> None:
        """Let the readers of `last` read `value`, and erase all from the layer to `last`."""
        last.replace_all_uses_with(value)
        while last is not self.node:
            source = last.args[0]
            assert isinstance(source, Node)
            self.module.graph.erase_node(last)
            last = source
        self.module.graph.erase_node(last)
