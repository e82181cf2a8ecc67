"""What batch normalisation knew, kept through folding: the folded op's output gives back what went in."""

from __future__ import annotations

import pytest
import torch

from fxquant.core.facts import NormStatistics
from fxquant.core.ir import Program, nodes_by_name
from fxquant.core.run import GraphReplay
from fxquant.passes import Canonicalize
from tests.models import MODELS
from tests.programs import captured, folded

FOLDED = {"residual": 2, "separable": 1, "sequence": 1}


def values(program: Program, name: str) -> dict[str, torch.Tensor]:
    _, environment = GraphReplay(program.module).forward(MODELS[name].inputs(3))
    return {node.name: value for node, value in environment.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", ["residual", "separable", "sequence"])
def test_the_input_of_the_normalisation_is_recovered_from_the_folded_op(name: str) -> None:
    known = folded(name)[NormStatistics].folded
    assert len(known) == FOLDED[name]
    before, after = values(Canonicalize()(captured(name)), name), values(folded(name), name)
    for op, told in known.items():
        shape = (-1, *[1] * (after[op].dim() - 2))
        recovered = (after[op] - told.shift.reshape(shape)) / told.factor.reshape(shape) + told.mean.reshape(shape)
        assert torch.allclose(recovered, before[op], atol=1e-5)
        assert not torch.allclose(after[op], before[op], atol=1e-2)


@pytest.mark.parametrize("name", ["shared", "concat", "token_norm"])
def test_what_was_not_folded_is_not_told(name: str) -> None:
    assert folded(name)[NormStatistics].folded == {}


def test_statistics_are_those_of_the_model() -> None:
    program = captured("residual")
    state: dict[str, torch.Tensor] = program.module.state_dict()
    told = list(folded("residual")[NormStatistics].folded.values())
    for number, each in enumerate(told, 1):
        mean, variance = (state[f"bn{number}.running_{kind}"] for kind in ("mean", "var"))
        assert torch.equal(each.mean, mean)
        assert torch.equal(each.variance, variance)
        expected = state[f"bn{number}.weight"].double() / torch.sqrt(variance.double() + 1e-5)
        assert torch.allclose(each.factor.double(), expected, rtol=1e-6)
    assert set(folded("residual")[NormStatistics].folded) <= set(nodes_by_name(folded("residual").module.graph))
