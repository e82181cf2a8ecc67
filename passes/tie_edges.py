"""Gather quantized edges into groups that share a scale, and groups into ties that share a bit width.

One value has one grid for all its readers. Ops that keep the grid (reshape, max pool, zero padding) carry the group of
their input to their output; a concatenation makes one group of all its inputs and its output. Sites that read one
group, or share one weight, agree on the activation's bits.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch.fx import Node

from fxquant.core.ir import EdgeGroups, Program, QuantizedEdges, ScaleRule, activation_inputs, nodes_by_name, rule_of
from fxquant.passes.base import Pass


class UnionFind:
    """Disjoint sets of names."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        """Return the representative of a name's set."""
        self._parent.setdefault(name, name)
        while self._parent[name] != name:
            self._parent[name] = self._parent[self._parent[name]]
            name = self._parent[name]
        return name

    def union(self, one: str, other: str) -> None:
        """Join two sets."""
        self._parent[self.find(one)] = self.find(other)


@dataclass(frozen=True)
class TieEdges(Pass):
    """Write `EdgeGroups` from `QuantizedEdges`."""

    reads = (QuantizedEdges,)
    writes = (EdgeGroups,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its edges in groups."""
        edges = program[QuantizedEdges].edges
        nodes = nodes_by_name(program.module.graph)
        quantized = {edge.producer for edge in edges}
        # First scales: two values share one where an op between them cannot requantize.
        scales = UnionFind()
        for name in quantized:
            rule = rule_of(nodes[name])
            if rule is None or rule.scale not in (ScaleRule.KEEP, ScaleRule.SHARE):
                continue
            for source in activation_inputs(nodes[name]):
                # The op may read the value in float while others read it quantized; then it carries no grid on.
                if source.name in quantized and _carries(source, nodes[name], program):
                    scales.union(name, source.name)
        # Graph order, so that a group is named after the value that is computed first, in every run.
        members: defaultdict[str, list[str]] = defaultdict(list)
        for name in (n for n in nodes if n in quantized):
            members[scales.find(name)].append(name)
        producers = {names[0]: tuple(names) for names in members.values()}
        owner = {name: group for group, names in producers.items() for name in names}
        grouped = {g: tuple(e for e in edges if owner[e.producer] == g) for g in producers}
        # Then bits: a weight has one precision, W and A together, so all values it meets have the same width.
        ties = UnionFind()
        readers: defaultdict[str, list[str]] = defaultdict(list)
        for edge in edges:
            weight = _weight_path(nodes[edge.consumer])
            if weight is not None:
                readers[weight].append(owner[edge.producer])
        for groups in readers.values():
            for group in groups[1:]:
                ties.union(group, groups[0])
        return program.with_facts(EdgeGroups(producers, grouped, {g: ties.find(g) for g in producers})), 0


def _carries(source: Node, reader: Node, program: Program) -> bool:
    """Whether the edge between the two is itself quantized, so that the reader sees grid values."""
    return any(e.producer == source.name and e.consumer == reader.name for e in program[QuantizedEdges].edges)


def _weight_path(node: Node) -> str | None:
    rule = rule_of(node)
    if rule is None or rule.weight is None:
        return None
    weight = node.args[rule.weight]
    return str(weight.target) if isinstance(weight, Node) else None
