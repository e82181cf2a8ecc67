from __future__ import annotations

import pytest

from fxquant.core.errors import PipelineError
from fxquant.core.ir import EdgeGroups, QuantizedEdges
from fxquant.passes import TieEdges, UnionFind
from tests.models import MODELS
from tests.programs import check_pass, folded, tied


def groups_of(name: str) -> list[tuple[str, ...]]:
    return list(tied(name)[EdgeGroups].producers.values())


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("residual", [("x",), ("relu",), ("conv2d_1",), ("relu_1",), ("conv2d_2",), ("mean",)]),
        # A concatenation makes one grid of its branches, and max pooling keeps it.
        ("concat", [("x",), ("relu", "conv2d_1", "cat", "max_pool2d"), ("getitem",), ("conv2d_2",), ("conv2d_3",)]),
        ("padded", [("x", "pad"), ("conv2d",), ("relu", "max_pool2d"), ("conv2d_2",), ("pad_1",), ("conv2d_3",)]),
        ("sequence", [("x",), ("relu", "max_pool1d", "slice_2"), ("conv1d_1",)]),
        ("weightless", []),
    ],
)
def test_values_that_share_a_grid(name: str, groups: list[tuple[str, ...]]) -> None:
    assert groups_of(name) == groups


def test_one_weight_ties_the_bits_of_all_it_meets() -> None:
    ties = tied("shared")[EdgeGroups].bit_ties
    assert ties["x"] == ties["relu"], "one convolution reads both"
    assert ties["amax"] == ties["sigmoid"], "two linear layers of one weight"
    assert len({ties["x"], ties["amax"], ties["conv2d"]}) == 3
    alone = tied("residual")[EdgeGroups].bit_ties
    assert len(set(alone.values())) == len(alone)


@pytest.mark.parametrize("name", list(MODELS))
def test_groups_part_the_edges(name: str) -> None:
    program = tied(name)
    done = check_pass(TieEdges(), program)
    edges, groups = program[QuantizedEdges].edges, done[EdgeGroups]
    assert groups == program[EdgeGroups], "the same every time"
    assert sorted(e for members in groups.edges.values() for e in members) == sorted(edges)
    assert list(groups.producers) == list(groups.edges) == list(groups.bit_ties)
    for group, producers in groups.producers.items():
        assert group == producers[0]
        assert {edge.producer for edge in groups.edges[group]} == set(producers)
        assert all(groups.group_of(producer) == group for producer in producers)


def test_edges_must_be_known_first() -> None:
    with pytest.raises(PipelineError, match="TieEdges reads QuantizedEdges, which no pass has written yet"):
        TieEdges()(folded("residual"))


def test_union_find() -> None:
    sets = UnionFind()
    for one, other in (("a", "b"), ("c", "d"), ("b", "c"), ("e", "e")):
        sets.union(one, other)
    assert len({sets.find(name) for name in "abcd"}) == 1
    assert sets.find("e") == "e"
    assert sets.find("f") == "f"
