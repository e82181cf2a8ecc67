"""How the inputs of an op in the quantized network go with its outputs in the float network.

What a rounded weight should reproduce is the float network's output, on the inputs that the network quantized so far
gives it. The bias stays a real number, so that it takes up every difference of means: moments are about the means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.core.errors import PipelineError
from fxquant.core.ir import Program, constant, rule_of, shape_of
from fxquant.passes.formats import squared_error
from fxquant.passes.rounding.closed_form.input_gram import (
    channel_axis,
    geometry_of,
    patches,
    rows_apart,
    some_rows,
    wide_product,
)


@dataclass(frozen=True)
class OutputMoments:
    """Moments of patches x that the quantized network reads and outputs y that the float network gives for them.

    Args:
        gram: `H = sum (x - mean x)(x - mean x)'`, float64 of shape (groups, K, K).
        cross: `C = sum (x - mean x)(y - mean y)'`, shape (groups, K, rows).
        power: `sum (y - mean y)^2`, shape (groups, rows).
        inputs: mean x, shape (groups, K).
        outputs: mean y, bias included, shape (groups, rows).
        halves: the same of either half of the images; empty where there are no two.
    """

    gram: Tensor
    cross: Tensor
    power: Tensor
    inputs: Tensor
    outputs: Tensor
    halves: tuple[OutputMoments, ...] = ()

    def error(self, values: Tensor) -> Tensor:
        """Return `sum (y - q x - b)^2` of rows q at their best bias: `q H q' - 2 q C + sum (y - mean y)^2`.

        Args:
            values: shape (groups, rows, K).

        Returns:
            shape (groups, rows).
        """
        return squared_error(values, self.gram) - 2 * (values * self.cross.transpose(1, 2)).sum(dim=2) + self.power

    def bias(self, values: Tensor) -> Tensor:
        """Return the best biases of rows q, `mean y - q mean x`, shape (channels,)."""
        return (self.outputs - (values @ self.inputs.unsqueeze(2)).squeeze(2)).flatten()

    @staticmethod
    def together(parts: Sequence[OutputMoments]) -> OutputMoments:
        """Return the moments of several ops that share a weight and have biases of their own; means are the first's."""
        sums = [torch.stack([getattr(part, name) for part in parts]).sum(dim=0) for name in ("gram", "cross", "power")]
        halves = [OutputMoments.together(each) for each in zip(*(part.halves for part in parts), strict=True)]
        return OutputMoments(sums[0], sums[1], sums[2], parts[0].inputs, parts[0].outputs, tuple(halves))


def output_moments(node: Node, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> OutputMoments:
    """Return the moments of one op over all batches; sums over batches are float64.

    Args:
        node: the op.
        inputs: what it reads in the quantized network, batch by batch.
        outputs: what it gives in the float network for the same images.

    Raises:
        PipelineError: there is no batch.
    """
    halves = [_Sums(), _Sums()]
    for number, (x, y) in enumerate(zip(inputs, outputs, strict=True)):
        middle = len(x) // 2
        if channel_axis(y.dim(), node) == 0 or middle == 0:
            # One image, whose axis 0 may count channels.
            halves[number % 2].add(node, x, y)
            continue
        halves[0].add(node, x[:middle], y[:middle])
        halves[1].add(node, x[middle:], y[middle:])
    known = [half for half in halves if half.count]
    if not known:
        raise PipelineError("no batch was counted; run images through the network first")
    if len(known) == 1:
        return known[0].moments()
    both = tuple(half.moments() for half in known)
    return replace(known[0].with_those_of(known[1]).moments(), halves=both)


class _Sums:
    """Sums over positions of what moments are made of: x x', x y', y^2, x, y."""

    def __init__(self) -> None:
        self.count, self._sums = 0, list[Tensor]()

    def add(self, node: Node, x: Tensor, y: Tensor) -> None:
        """Count inputs and outputs of an op for some images."""
        geometry = geometry_of(node)
        axis, apart = channel_axis(y.dim(), node), rows_apart(x, geometry)
        y = some_rows(y, axis + 1, apart) if apart > 1 else y
        rows = y.movedim(axis, -1).reshape(-1, geometry.groups, y.shape[axis] // geometry.groups).transpose(0, 1)
        start = 0
        for piece in patches(x, geometry, apart=apart):
            part = rows[:, start : start + piece.shape[1]]
            start += piece.shape[1]
            transposed, plain = piece.transpose(1, 2), (part.double().square(), piece, part)
            found = [wide_product(transposed, other) for other in (piece, part)]
            found += [each.sum(dim=1, dtype=torch.float64) for each in plain]
            sums = self._sums or [torch.zeros_like(each) for each in found]
            self._sums = [total.add_(each) for total, each in zip(sums, found, strict=True)]
        self.count += start

    def with_those_of(self, other: _Sums) -> _Sums:
        """Return the sums over the positions of both."""
        found = _Sums()
        found.count = self.count + other.count
        found._sums = [one + another for one, another in zip(self._sums, other._sums, strict=True)]
        return found

    def moments(self) -> OutputMoments:
        """Return the moments about the means."""
        gram, cross, power, x, y = self._sums
        x, y = x / self.count, y / self.count
        gram = (gram + gram.transpose(1, 2)) / 2 - self.count * x.unsqueeze(2) * x.unsqueeze(1)
        cross = cross - self.count * x.unsqueeze(2) * y.unsqueeze(1)
        return OutputMoments(gram, cross, (power - self.count * y.square()).clamp(min=0), x, y)


def bias_of(program: Program, node: Node) -> Tensor:
    """Return the bias of a weighted op, float64 of shape (channels,), zeros where it has none."""
    rule = rule_of(node)
    assert rule is not None
    assert rule.weight is not None
    assert rule.bias is not None
    value = constant(program.module, node.args[rule.bias]) if len(node.args) > rule.bias else None
    weight = shape_of(node.args[rule.weight])
    return torch.zeros(weight[rule.channel_axis], dtype=torch.float64) if value is None else value.double()
