"""Measure what the model of rounding noise needs: ranges, mean squares and squared gradients, class by class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxquant.core.ir import (
    EdgeGroups,
    Program,
    QuantizedEdges,
    ScaleRule,
    Sites,
    constant,
    resolve,
    rule_of,
    shape_of,
    traced_images,
)
from fxquant.core.run import CalibrationSet, answer_parts, channels_last
from fxquant.passes.equalization.channel_factors import ChannelFactors
from fxquant.passes.equalization.rounding_noise import RoundingNoise, ValueNoise, WeightNoise
from fxquant.passes.rounding.closed_form.input_gram import channel_axis, geometry_of

RECORDED_BYTES = 2 * 10**8
"""Bytes of values that a recorded run keeps, for as long as one image takes no more."""
LEAST_RANGE = 0.01
"""Share of a value's range that each class has at least: a channel that is silent on the calibration images need not
be on others."""
MOST_ROWS = 128
"""Output channels of a layer that are looked at; of more, a sample is, evenly spaced."""
PROJECTIONS = 2
"""Random projections of the answers of each batch, where batches are few."""
FEW_BATCHES = 8
"""With more, one projection of each is enough."""


def recorded_batch(module: GraphModule) -> int:
    """Return how many images a recorded run takes at once, at least one."""
    nodes = [node for node in module.graph.nodes if node.op != "get_attr"]
    image = 4 * sum(prod(shape_of(node)) for node in nodes if shape_of(node)) // max(1, traced_images(module.graph))
    return max(1, RECORDED_BYTES // max(1, image))


def measured_noise(
    program: Program, module: GraphModule, factors: ChannelFactors, images: CalibrationSet, batch: int
) -> RoundingNoise:
    """Return the noise model of a network.

    Args:
        program: edges, groups and sites of the network.
        module: its graph, without observers and quantizers.
        factors: classes of its elements, found with `batch` images.
        images: calibration images, of which whole batches are run.
        batch: images that are run together.
    """
    groups, edges = program[EdgeGroups], program[QuantizedEdges]
    bits = _bits(program)
    values = {
        name: _ValueStatistics(group, factors.values[name])
        for name in dict.fromkeys(edge.producer for edge in edges.edges)
        if (group := groups.group_of(name)) is not None
        and name in factors.values
        and _rounds(module, name, groups.producers[group])
    }
    layers = [resolve(module.graph, name) for site in program[Sites].sites for name in site.nodes]
    found = {layer.name: _WeightStatistics.of(layer, module, factors) for layer in layers}
    weights = {name: statistics for name, statistics in found.items() if statistics is not None}
    projections = PROJECTIONS if len(images) // batch <= FEW_BATCHES else 1
    recorder = _Recorder(answer_parts(module), values, weights, projections)
    generator = torch.Generator().manual_seed(0)
    for part in images.batches(batch):
        if len(part) == batch:
            recorder.add(tuple(channels_last(each) for each in part.inputs), generator)
    return RoundingNoise(
        factors.count,
        tuple(each.noise(2.0 ** bits[1] - 1) for each in values.values()),
        tuple(each.noise(2.0 ** bits[0] - 2) for each in weights.values()),
    )


def _bits(program: Program) -> tuple[float, float]:
    """Return the middle width of the weights, and that of the activations, over all choices of the sites."""
    choices = [c for site in program[Sites].sites for c in site.choices if not c.is_float and not c.weights_only]
    if not choices:
        return 8.0, 8.0
    return max(2.0, median(c.weight_bits for c in choices)), float(median(c.activation_bits for c in choices))


def _rounds(module: GraphModule, name: str, group: tuple[str, ...]) -> bool:
    """Whether a value is rounded, and does not lie on its grid already as what it was made of."""
    node = resolve(module.graph, name)
    rule = rule_of(node)
    keeps = rule is not None and rule.scale in (ScaleRule.KEEP, ScaleRule.SHARE)
    return not (keeps and any(source.name in group for source in node.all_input_nodes))


class _ByClass:
    """Sums and extremes of the elements of each class.

    Args:
        classes: class of each element, of a shape that broadcasts to the values'.
    """

    def __init__(self, classes: Tensor) -> None:
        found, index = np.unique(classes.numpy(), return_inverse=True)
        self.classes, self._index, self._axes = (
            torch.from_numpy(found),
            torch.from_numpy(index).flatten(),
            classes.shape,
        )

    def extreme(self, value: Tensor, largest: bool) -> Tensor:
        """Return the largest or the smallest element of each class, and not 0 crossed, shape (K,)."""
        rows = self._reduced(value, Tensor.amax if largest else Tensor.amin)
        found = rows.new_zeros(len(self.classes))
        return found.scatter_reduce(0, self._index, rows, "amax" if largest else "amin")

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over each class, shape (K,)."""
        return value.new_zeros(len(self.classes)).index_add(0, self._index, self._reduced(value, Tensor.sum))

    def _reduced(self, value: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        spare = value.dim() - len(self._axes)
        axes = [*range(spare), *(spare + k for k, size in enumerate(self._axes) if size == 1)]
        return (reduce(value, dim=axes) if axes else value).flatten()


class _ValueStatistics:
    """What the rounding of one value needs, batch by batch."""

    def __init__(self, group: str, classes: Tensor) -> None:
        self._group, self._by = group, _ByClass(classes)
        self._low, self._high, self._sensitivity = (torch.zeros(len(self._by.classes)) for _ in range(3))

    def add(self, value: Tensor) -> None:
        """Count the values of a batch."""
        self._low = torch.minimum(self._low, self._by.extreme(value, largest=False))
        self._high = torch.maximum(self._high, self._by.extreme(value, largest=True))

    def add_gradient(self, gradient: Tensor) -> None:
        """Count the gradients of one projection."""
        self._sensitivity += self._by.total(gradient.square())

    def noise(self, levels: float) -> ValueNoise:
        """Return the numbers of the model."""
        least = LEAST_RANGE * float(self._high.amax() - self._low.amin())
        # A class that is never negative stays so: only the end that it has is moved.
        short = (self._high - self._low) < least
        high = torch.where(short & (self._high >= -self._low), self._high.clamp(min=least), self._high)
        low = torch.where(short & (self._high < -self._low), self._low.clamp(max=-least), self._low)
        return ValueNoise(self._group, self._by.classes, low, high, self._sensitivity, levels)


@dataclass
class _WeightStatistics:
    """What the rounding of one layer's weight needs, batch by batch."""

    classes: Tensor
    largest: Tensor
    taps: int
    channels_at: Callable[[int], int]
    power: Tensor
    sensitivity: Tensor
    counted: int = 0

    @staticmethod
    def of(node: Node, module: GraphModule, factors: ChannelFactors) -> _WeightStatistics | None:
        """Return the statistics of a node before any batch, None where it has no weight or the graph computes it."""
        rule = rule_of(node)
        source = node.args[rule.weight] if rule is not None and rule.weight is not None else None
        weight = constant(module, source)
        if weight is None or not isinstance(source, Node):
            return None
        groups, (rows, columns) = geometry_of(node).groups, weight.shape[:2]
        divides = factors.parameters.get(str(source.target), (None, None))[1]
        read = torch.zeros(1, 1, dtype=torch.int64) if divides is None else divides.reshape(divides.shape[:2])
        spread = read.expand(rows, columns).reshape(groups, rows // groups, columns)
        return _WeightStatistics(
            spread[:, 0],
            weight.abs().reshape(groups, rows // groups, columns, -1).amax(dim=3).float(),
            prod(weight.shape[2:]),
            lambda dimensions: channel_axis(dimensions, node),
            torch.zeros(groups, columns),
            torch.zeros(groups, rows // groups),
        )

    def add(self, value: Tensor) -> None:
        """Count the input of a batch."""
        power = self._squares(value)
        self.power += power.reshape(self.power.shape)
        self.counted += value.numel() // power.numel()

    def add_gradient(self, gradient: Tensor) -> None:
        """Count the gradients of one projection in the output."""
        self.sensitivity += self._squares(gradient).reshape(self.sensitivity.shape)

    def _squares(self, value: Tensor) -> Tensor:
        """Return the sum of squares of each channel."""
        others = [axis for axis in range(value.dim()) if axis != self.channels_at(value.dim())]
        return value.square().sum(dim=others) if others else value.square()

    def noise(self, levels: float) -> WeightNoise:
        """Return the numbers of the model."""
        power, rows = self.power / max(1, self.counted), self.largest.shape[1]
        every = -(-rows // MOST_ROWS)
        # The rows that are left out count as those that are in.
        sensitivity = self.taps * self.sensitivity[:, ::every] * rows / len(range(0, rows, every))
        return WeightNoise(self.classes, self.largest[:, ::every], power, sensitivity, levels)


class _Recorder(Interpreter):
    """Runs a graph with gradients and counts values and squared gradients.

    Args:
        module: graph whose outputs are compared.
        values: name of a value -> its statistics.
        weights: name of a layer -> its statistics.
        projections: random projections of the answers of each batch.
    """

    def __init__(
        self,
        module: GraphModule,
        values: dict[str, _ValueStatistics],
        weights: dict[str, _WeightStatistics],
        projections: int,
    ) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._values, self._weights, self._projections = values, weights, projections
        self._watched: list[tuple[Callable[[Tensor], None], Tensor]] = []

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self._values or n.name in self._weights:
            if not value.requires_grad:
                value = value.detach().requires_grad_()
            for known in (self._values, self._weights):
                if n.name in known:
                    self._watched.append((known[n.name].add_gradient, value))
            if n.name in self._values:
                self._values[n.name].add(value.detach())
            if n.name in self._weights:
                self._weights[n.name].add(self.env[n.all_input_nodes[0]].detach())
        return value

    def add(self, inputs: tuple[Tensor, ...], generator: torch.Generator) -> None:
        """Run a batch and count it."""
        self._watched = []
        with torch.enable_grad():
            answers = self.run(*inputs, enable_io_processing=False)
        given = answers if isinstance(answers, tuple | list) else (answers,)
        parts = [part for part in given if isinstance(part, Tensor) and part.requires_grad]
        for left in reversed(range(self._projections)):
            projected = sum((_projected(part, generator) for part in parts), torch.zeros(()))
            if not parts:
                return
            gradients = torch.autograd.grad(
                projected, [value for _, value in self._watched], retain_graph=left > 0, allow_unused=True
            )
            for (count, _), gradient in zip(self._watched, gradients, strict=True):
                if gradient is not None:
                    count(gradient.detach())


def _projected(answer: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random projection of answers over their root mean square, so that several count alike."""
    signs = torch.randn(answer.shape, generator=generator, dtype=answer.dtype)
    return (signs * answer).sum() / answer.detach().square().mean().sqrt().clamp(min=1e-12)
