"""Requantization between neighbours: what it costs to hand a value from one activation width to another.

A value that one site writes and the next one reads at another width, or in float, is requantized on the way. That is
a term of two choices, so it fits into the quadratic objective.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch.fx import Graph, Node

from fxquant.core.facts import BitAllocation, CostTables, SensitivityMatrix, usage
from fxquant.core.ir import (
    Candidate,
    Choice,
    Program,
    QuantizedEdges,
    ScaleRule,
    Site,
    Sites,
    activation_inputs,
    rule_of,
)
from fxquant.passes.allocation.solution import BoolArray, FloatArray

CARRIES = (ScaleRule.KEEP, ScaleRule.ABSORB, ScaleRule.SHARE)
"""Ops through which a value passes in the form it has."""


def neighbours(graph: Graph, sites: Iterable[Site], integer_nodes: frozenset[str]) -> list[tuple[str, str]]:
    """Return (writer, reader) for every two sites with no other site and no float op in between, each pair once.

    Args:
        graph: the float graph.
        sites: places whose precision is decided.
        integer_nodes: ops with arithmetic that are computed on integers, as in `QuantizedEdges`.
    """
    site_of = {node: site.name for site in sites if not site.stored for node in site.nodes}
    writers: dict[Node, set[str]] = {}
    found: dict[tuple[str, str], None] = {}
    for node in graph.nodes:
        rule = rule_of(node)
        reaching = sorted({name for source in activation_inputs(node) for name in writers.get(source, ())})
        if node.name in site_of:
            found.update(dict.fromkeys((writer, site_of[node.name]) for writer in reaching))
            writers[node] = {site_of[node.name]}
        elif rule is not None and (rule.scale in CARRIES or (rule.weight is None and node.name in integer_nodes)):
            writers[node] = set(reaching)
    # A layer used twice in a row has one precision: there is nothing to disagree about. Two layers that feed each
    # other, each used twice, are one pair.
    apart = {frozenset(pair): pair for pair in found if pair[0] != pair[1]}
    return list(apart.values())


def borders_of(program: Program, cost: float) -> FloatArray:
    """Return `border_terms` of a program with `Sites` and `QuantizedEdges`."""
    sites = program[Sites]
    pairs = neighbours(program.module.graph, sites.sites, program[QuantizedEdges].integer_nodes)
    return border_terms(sites.candidates, pairs, cost)


def border_terms(candidates: tuple[Candidate, ...], pairs: Iterable[tuple[str, str]], cost: float) -> FloatArray:
    """Return B with `x' B x = cost x (neighbours whose activation widths differ)` for one-hot x, symmetric (n, n).

    Args:
        candidates: the n columns.
        pairs: neighbouring sites, each pair once.
        cost: of one border, in the unit of the loss, at least 0; float against integer is a border too.
    """
    terms = np.zeros((len(candidates), len(candidates)))
    columns: dict[str, list[int]] = {}
    for index, candidate in enumerate(candidates):
        columns.setdefault(candidate.site, []).append(index)
    for one, other in pairs:
        for i in columns[one]:
            for j in columns[other]:
                if candidates[i].choice.activation_bits != candidates[j].choice.activation_bits:
                    terms[i, j] += cost / 2
                    terms[j, i] += cost / 2
    return terms


def one_hot(candidates: tuple[Candidate, ...], choices: Mapping[str, Choice]) -> BoolArray:
    """Return the plan as (n,) bool over the candidates."""
    return np.array([choices[c.site] == c.choice for c in candidates], dtype=np.bool_)


def border_cost(borders: FloatArray, picked: BoolArray) -> float:
    """Return `x' borders x` of a plan, (n,) bool."""
    return float(borders[np.ix_(picked, picked)].sum())


def modelled_plan(
    program: Program,
    choices: dict[str, Choice],
    matrix: SensitivityMatrix,
    borders: FloatArray,
    limits: dict[str, float],
) -> BitAllocation:
    """Return a plan with its modelled loss, the cost of its borders, and what it uses of each limit.

    Args:
        program: with `Sites` and `CostTables`.
        choices: a candidate for every site.
        matrix: predicts the loss.
        borders: from `borders_of`.
        limits: limit name -> what is allowed.
    """
    return BitAllocation(
        choices,
        objective=matrix.predict(choices),
        used=usage(choices, limits, program[CostTables]),
        limits=limits,
        border_cost=border_cost(borders, one_hot(program[Sites].candidates, choices)),
    )
