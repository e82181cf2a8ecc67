"""Which values carry a quantizer and which must agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fxquant.core.ir.spec import Edge, Sites


@dataclass(frozen=True)
class QuantizedEdges:
    """The edges that carry a quantizer, and what they make possible.

    Args:
        edges: in graph order of their producers.
        integer_nodes: names of weighted ops and joins computed on integers.
        float_reasons: node name -> why an op with weights or arithmetic is computed in float.
        unrounded: edges into sums that a kernel computes before it rounds. They carry no quantizer as long as the sum
            runs in integers, and are observed for the plans in which it does not.
    """

    edges: tuple[Edge, ...]
    integer_nodes: frozenset[str]
    float_reasons: dict[str, str]
    unrounded: tuple[Edge, ...] = ()


@dataclass(frozen=True)
class EdgeGroups:
    """The quantized edges gathered into groups that share one scale and zero-point.

    Args:
        producers: group name -> producers whose values lie on the group's grid; the name is the first of them.
        edges: group name -> edges that carry the group's quantizer.
        bit_ties: group name -> name of the tie; groups of one tie agree on activation bits.
    """

    producers: dict[str, tuple[str, ...]]
    edges: dict[str, tuple[Edge, ...]]
    bit_ties: dict[str, str]

    def group_of(self, producer: str) -> str | None:
        """Return the group of a producer, None for a value without a quantizer."""
        return next((name for name, members in self.producers.items() if producer in members), None)


@dataclass(frozen=True)
class PlanEdges:
    """What plans with float sites have in the place of the program's edges, groups and sites.

    It holds for the graph, target and settings that the program's `Sites` were found with.

    Args:
        kept: site name -> why it is in float in every plan; `Sites` does not list it.
        found: float sites of a plan -> its edges, groups and sites; filled as plans ask for them.
    """

    kept: Mapping[str, str] = field(default_factory=dict)
    found: dict[frozenset[str], tuple[QuantizedEdges, EdgeGroups, Sites]] = field(
        default_factory=dict, repr=False, compare=False
    )
