from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest

from fxquant.core.ir import FLOAT, Candidate, Choice, QuantizedEdges, Sites
from fxquant.passes import FindSites
from fxquant.passes.allocation import border_terms, neighbours
from tests.programs import TARGET, tied

A4, A8 = Choice(8, 4), Choice(8, 8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # conv1 reaches conv3 through the add; the second add runs in float, so nothing reaches fc.
        ("residual", {("conv1", "conv2"), ("conv1", "conv3"), ("conv2", "conv3")}),
        ("name_clash", {("conv.0", "conv.1"), ("conv.1", "conv_1")}),
        # The concatenation passes both on, the batch norm behind it does not.
        ("concat", {("left", "pooled"), ("right", "pooled")}),
        # The convolution follows itself, and a float op stands between the layers of one weight.
        ("shared", set()),
        ("separable", {("depthwise", "pointwise"), ("pointwise", "head")}),
    ],
)
def test_neighbours(name: str, expected: set[tuple[str, str]]) -> None:
    program = FindSites(TARGET, (8,), (8,))(tied(name))
    found = neighbours(program.module.graph, program[Sites].sites, program[QuantizedEdges].integer_nodes)
    assert set(found) == expected
    assert len(found) == len(expected)


def test_a_border_costs_once_whichever_way_it_lies() -> None:
    candidates = tuple(Candidate(site, choice) for site in "abc" for choice in (A4, A8, FLOAT))
    terms = border_terms(candidates, [("a", "b"), ("b", "c")], 0.25)
    assert np.array_equal(terms, terms.T)
    assert not np.diag(terms).any()
    for row in product((A4, A8, FLOAT), repeat=3):
        plan = dict(zip("abc", row, strict=True))
        x = np.array([plan[c.site] == c.choice for c in candidates], dtype=float)
        borders = sum(one.activation_bits != other.activation_bits for one, other in pairwise(row))
        assert x @ terms @ x == 0.25 * borders


def test_weight_bits_make_no_border_and_no_cost_no_terms() -> None:
    candidates = tuple(Candidate(site, choice) for site in "ab" for choice in (Choice(2, 8), A8))
    assert not border_terms(candidates, [("a", "b")], 1.0).any()
    wide = tuple(Candidate(site, choice) for site in "ab" for choice in (A4, A8))
    assert not border_terms(wide, [("a", "b")], 0.0).any()
