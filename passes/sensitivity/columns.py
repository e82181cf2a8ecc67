"""Columns: the perturbations that are measured, and how the candidates are composed of them.

With one activation width, a candidate (site, W, A) is one perturbation: its weight is rounded, and so is the activation
it reads (CLADO, arXiv 2307.05657). With several widths, weight and activation are perturbed apart: one column for each
(site, W), and one for each (tie of activation groups, A) that rounds every value of the tie, as a plan would. The k
sites that read the tie agree on A and carry `1 / k` of its column each, so that together they carry it once:
`values = spread measured spread'`. Rounding a shared value once per reader instead would count its noise k times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from fxquant.core.facts import BitAllocation, FakeQuantNodes, Ranges, WeightGrids
from fxquant.core.ir import (
    FLOAT_BITS,
    EdgeGroups,
    FakeQuantize,
    Program,
    ScaleRule,
    Sites,
    WeightFormat,
    activation_inputs,
    resolve,
    rule_of,
    tensor_at,
)

Replacement = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """Replaces a fake-quant node on a weight: returns the rounded weight, whatever the input."""

    value: Tensor

    def __call__(self, _: Tensor) -> Tensor:
        """Return the rounded weight."""
        return self.value


@dataclass(frozen=True, eq=False)
class Column:
    """One perturbation.

    Args:
        owner: the site or tie it perturbs; a plan has at most one column of each owner.
        substitution: fake-quant node -> its replacement; empty for float.
        site: the site whose weight it rounds, None for activations alone.
        weight: format of that weight, None without.
        activation_bits: width of the activations, None where they are not changed.
    """

    owner: str
    substitution: Mapping[str, Replacement]
    site: str | None
    weight: WeightFormat | None
    activation_bits: int | None

    @property
    def weight_bits(self) -> float | None:
        """Bits of the weight's format, None without."""
        return None if self.weight is None else self.weight.bits


class Replacements:
    """Makes replacements of fake-quant nodes: one object for each node and width, compared by identity."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._nodes = program[FakeQuantNodes]
        self._weights: dict[tuple[str, WeightFormat], RoundedWeight] = {}
        self._activations: dict[tuple[str, int], FakeQuantize] = {}

    def weight(self, site: str, weight: WeightFormat) -> dict[str, Replacement]:
        """Return the substitution that rounds a site's weight."""
        if (site, weight) not in self._weights:
            grids, path = self._program[WeightGrids], self._program[Sites].by_name(site).weight
            value = grids.rounded.get((site, weight), tensor_at(self._program.module, path).detach())
            with torch.no_grad():
                rounded = FakeQuantize(grids.at(site, weight))(value)
            # What was rounded before is not held twice.
            self._weights[site, weight] = RoundedWeight(value if torch.equal(rounded, value) else rounded)
        return dict.fromkeys(self._nodes.weights[site], self._weights[site, weight])

    def inputs(self, site: str, bits: int) -> dict[str, Replacement]:
        """Return the substitution that rounds the values a site reads."""
        return {name: self._activation(name, bits) for name in self._nodes.inputs[site]}

    def group(self, group: str, bits: int) -> dict[str, Replacement]:
        """Return the substitution that rounds every value of an activation group, each once.

        A node whose inputs are rearranged values of the group (by a reshape, a max pool) is left out: the values lie on
        the grid already, and estimators that add up noise would count it twice.
        """
        members = self._nodes.activations[group]
        fresh = [name for name in members if not _rounded(resolve(self._program.module.graph, name), members)]
        return {name: self._activation(name, bits) for name in fresh}

    def _activation(self, name: str, bits: int) -> FakeQuantize:
        if (name, bits) not in self._activations:
            groups = self._program[EdgeGroups]
            source = resolve(self._program.module.graph, name).all_input_nodes[0]
            group = groups.group_of(source.name)
            assert group is not None
            quantizer = FakeQuantize(self._program[Ranges].grid(groups.producers[group], bits))
            self._activations[name, bits] = quantizer
        return self._activations[name, bits]

    def plan(self, plan: BitAllocation) -> dict[str, dict[str, Replacement]]:
        """Return owner -> substitution of a whole plan, values that no site reads at the plan's widest width."""
        sites, groups = self._program[Sites], self._program[EdgeGroups]
        integers = [c.activation_bits for c in plan.choices.values() if c.activation_bits != FLOAT_BITS]
        widths: dict[str, int] = {}
        parts: dict[str, dict[str, Replacement]] = {}
        for site in sites.sites:
            choice = plan.choices[site.name]
            parts[site.name] = {} if choice.is_float else self.weight(site.name, choice.weight)
            if choice.activation_bits != FLOAT_BITS:
                widths[site.input_tie] = choice.activation_bits
        read = {site.input_tie for site in sites.sites}
        for group, tie in groups.bit_ties.items():
            default = None if tie in read or not integers else max(integers)
            bits = widths.get(tie, default)
            if bits is not None:
                parts.setdefault(f"tie {tie}", {}).update(self.group(group, bits))
        return parts


def _rounded(node: Node, members: Collection[str]) -> bool:
    """Whether all values that enter a node come from `members` by ops that keep the grid."""
    sources = activation_inputs(node)
    return bool(sources) and all(
        source.name in members or (_keeps_grid(source) and _rounded(source, members)) for source in sources
    )


def _keeps_grid(node: Node) -> bool:
    rule = rule_of(node)
    return rule is not None and rule.scale in (ScaleRule.KEEP, ScaleRule.SHARE)


def columns_of(program: Program, quantizers: Replacements) -> tuple[tuple[Column, ...], NDArray[np.float64]]:
    """Return the perturbations to measure, and the shares that make the candidates of them.

    Returns:
        The m columns, and `spread` of shape (candidates, m), entries in 0..1.
    """
    sites = program[Sites]
    widths = {c.choice.activation_bits for c in sites.candidates} - {FLOAT_BITS}
    if len(widths) <= 1:
        return _joint(sites, quantizers), np.eye(len(sites.candidates))
    return _apart(program, quantizers)


def _joint(sites: Sites, quantizers: Replacements) -> tuple[Column, ...]:
    made = []
    for site, choice in ((c.site, c.choice) for c in sites.candidates):
        if choice.is_float:
            made.append(Column(site, {}, site, choice.weight, None))
        else:
            both = quantizers.weight(site, choice.weight)
            both |= {} if choice.weights_only else quantizers.inputs(site, choice.activation_bits)
            bits = None if choice.weights_only else choice.activation_bits
            made.append(Column(site, both, site, choice.weight, bits))
    return tuple(made)


def _apart(program: Program, quantizers: Replacements) -> tuple[tuple[Column, ...], NDArray[np.float64]]:
    sites, ties = program[Sites], program[EdgeGroups].bit_ties
    readers: defaultdict[str, int] = defaultdict(int)
    for site in (site for site in sites.sites if not site.stored):
        readers[site.input_tie] += 1
    columns: list[Column] = []
    at: dict[tuple[str, WeightFormat | int], int] = {}
    for site in sites.sites:
        for weight in sorted({choice.weight for choice in site.choices}):
            change = {} if weight.is_float else quantizers.weight(site.name, weight)
            at[site.name, weight] = len(columns)
            columns.append(Column(site.name, change, site.name, weight, None))
    for tie in readers:
        members = [group for group, own in ties.items() if own == tie]
        choices = [choice for site in sites.sites if site.input_tie == tie for choice in site.choices]
        for bits in sorted({choice.activation_bits for choice in choices if not choice.is_float}):
            change = {name: r for group in members for name, r in quantizers.group(group, bits).items()}
            at[f"tie {tie}", bits] = len(columns)
            columns.append(Column(f"tie {tie}", change, None, None, bits))
    spread = np.zeros((len(sites.candidates), len(columns)))
    for row, candidate in enumerate(sites.candidates):
        spread[row, at[candidate.site, candidate.choice.weight]] = 1.0
        if candidate.choice.activation_bits != FLOAT_BITS:
            tie = sites.by_name(candidate.site).input_tie
            spread[row, at[f"tie {tie}", candidate.choice.activation_bits]] = 1.0 / readers[tie]
    return tuple(columns), spread
