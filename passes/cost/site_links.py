"""Links between sites: edges at which a value may have to be converted between float and integers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from math import prod

from torch.fx import Graph, Node

from fxquant.core.errors import OptionError
from fxquant.core.ir import ScaleRule, Site, activation_inputs, rule_of, sample_shape

CARRIES = (ScaleRule.KEEP, ScaleRule.ABSORB, ScaleRule.SHARE)
"""Ops through which a value passes in the form it has."""


@dataclass(frozen=True)
class SiteLink:
    """Two sites, one of which reads what the other wrote, or both of which write into one join.

    Args:
        one: the writer; the earlier writer where both values go into one join.
        other: the reader; the later writer of a join.
        elements: values that arrive, for one sample, above 0.
        pooled: values that were written and do not arrive: a quantizer is in front of a pool, not behind it.
        joined: whether the two are writers of one join (an add, a concatenation) instead of writer and reader.

    Raises:
        OptionError: a site that is linked to itself, or no elements.
    """

    one: str
    other: str
    elements: int
    joined: bool = False
    pooled: int = 0

    def __post_init__(self) -> None:
        if self.one == self.other or self.elements <= 0:
            raise OptionError(f"{self} is no border: two sites and at least one element are needed")


def site_links(graph: Graph, sites: Iterable[Site]) -> tuple[SiteLink, ...]:
    """Return where values pass from site to site with no other site, no float op and at most one join in between.

    A value that comes through two joins is left out: whether it is on a grid depends on those who read it in between.
    Several links of one pair are one with their elements added up.

    Args:
        graph: the float graph.
        sites: places whose precision is decided.
    """
    site_of = {node: site.name for site in sites if not site.stored for node in site.nodes}
    # Writer -> values it wrote, for what comes straight from it and for what comes through one join.
    straight: dict[Node, dict[str, int]] = {}
    behind: dict[Node, dict[str, int]] = {}
    found: dict[tuple[str, str, bool], tuple[int, int]] = {}

    def add(one: str, other: str, arriving: int, written: int, *, joined: bool) -> None:
        if one != other:
            elements, pooled = found.get((one, other, joined), (0, 0))
            found[one, other, joined] = elements + arriving, pooled + max(0, written - arriving)

    for node in graph.nodes:
        rule, inputs, size = rule_of(node), activation_inputs(node), _elements(node)
        if node.name in site_of:
            for source in inputs:
                arriving, direct = _elements(source), straight.get(source, {})
                for writer, written in behind.get(source, {}).items():
                    add(writer, site_of[node.name], arriving, written, joined=False)
                for writer, written in direct.items():
                    # Of a concatenation each writer has its part.
                    part = max(1, arriving * written // sum(direct.values()))
                    add(writer, site_of[node.name], part, written, joined=False)
            straight[node] = {site_of[node.name]: size}
        elif rule is None or rule.weight is not None or rule.scale is ScaleRule.FLOAT:
            continue
        else:
            writers = _union(straight, inputs)
            if len(inputs) > 1:
                for one, other in combinations(writers, 2):
                    add(one, other, size, size, joined=True)
            carries = rule.scale in CARRIES or len(inputs) == 1
            straight[node] = writers if carries else {}
            behind[node] = _union(behind, inputs) if carries else dict.fromkeys(writers, size)
    return tuple(SiteLink(one, other, n, joined, pooled) for (one, other, joined), (n, pooled) in found.items())


def _union(known: dict[Node, dict[str, int]], nodes: Iterable[Node]) -> dict[str, int]:
    return {name: written for node in nodes for name, written in known.get(node, {}).items()}


def _elements(node: Node) -> int:
    return max(1, prod(sample_shape(node)))
