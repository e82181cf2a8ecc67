"""Where one site hands a value to another: the places at which float and integers can meet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from math import prod

from torch.fx import Graph, Node

from fxquant.core.errors import OptionError
from fxquant.core.ops import ScaleRule, activation_inputs, rule_of, sample_shape
from fxquant.core.spec import Site

CARRIES = (ScaleRule.KEEP, ScaleRule.ABSORB, ScaleRule.SHARE)
"""Ops through which a value passes in the form it has."""


@dataclass(frozen=True)
class HandOver:
    """Two sites whose values meet.

    Args:
        one: the writer; the earlier writer where both values go into one join.
        other: the reader; the later writer of a join.
        elements: values handed over for one sample, above 0.
        joined: whether the two are writers of one join (an add, a concatenation) instead of writer and reader.

    Raises:
        OptionError: a site that hands over to itself, or no elements.
    """

    one: str
    other: str
    elements: int
    joined: bool = False

    def __post_init__(self) -> None:
        if self.one == self.other or self.elements <= 0:
            raise OptionError(f"{self} is no border: two sites and at least one element are needed")


def hand_overs(graph: Graph, sites: Iterable[Site]) -> tuple[HandOver, ...]:
    """Return where values pass from site to site with no other site, no float op and at most one join in between.

    A value that comes through two joins is left out: whether it is on a grid is for those who read it in between to
    say. Several such places of one pair are one hand-over with their elements added up.

    Args:
        graph: the float graph.
        sites: places whose precision is decided.
    """
    site_of = {node: site.name for site in sites for node in site.nodes}
    straight: dict[Node, tuple[str, ...]] = {}
    behind: dict[Node, tuple[str, ...]] = {}
    found: dict[tuple[str, str, bool], int] = {}

    def add(one: str, other: str, value: Node, *, joined: bool) -> None:
        if one != other:
            found[one, other, joined] = found.get((one, other, joined), 0) + max(1, prod(sample_shape(value)))

    for node in graph.nodes:
        rule, inputs = rule_of(node), activation_inputs(node)
        if node.name in site_of:
            for source in inputs:
                for writer in (*straight.get(source, ()), *behind.get(source, ())):
                    add(writer, site_of[node.name], source, joined=False)
            straight[node] = (site_of[node.name],)
        elif rule is None or rule.weight is not None or rule.scale is ScaleRule.FLOAT:
            continue
        elif rule.scale in CARRIES or len(inputs) == 1:
            straight[node] = _union(straight, inputs)
            behind[node] = _union(behind, inputs)
        else:
            writers = _union(straight, inputs)
            behind[node] = writers
            for one, other in combinations(writers, 2):
                add(one, other, node, joined=True)
    return tuple(HandOver(one, other, count, joined) for (one, other, joined), count in found.items())


def _union(known: dict[Node, tuple[str, ...]], nodes: Iterable[Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for node in nodes for name in known.get(node, ())))
