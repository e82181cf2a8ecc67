"""Statistics of batch normalisations kept through folding: they recover the input from the folded op's output."""

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
    for op, norm in known.items():
        shape = (-1, *[1] * (after[op].dim() - 2))
        recovered = (after[op] - norm.shift.reshape(shape)) / norm.factor.reshape(shape) + norm.mean.reshape(shape)
        assert torch.allclose(recovered, before[op], atol=1e-5)
        assert not torch.allclose(after[op], before[op], atol=1e-2)


@pytest.mark.parametrize("name", ["shared", "concat", "token_norm"])
def test_what_was_not_folded_has_no_statistics(name: str) -> None:
    assert folded(name)[NormStatistics].folded == {}


def test_statistics_are_those_of_the_model() -> None:
    program = captured("residual")
    state: dict[str, torch.Tensor] = program.module.state_dict()
    for number, each in enumerate(folded("residual")[NormStatistics].folded.values(), 1):
        mean, variance = (state[f"bn{number}.running_{kind}"] for kind in ("mean", "var"))
        assert torch.equal(each.mean, mean)
        assert torch.equal(each.variance, variance)
        expected = state[f"bn{number}.weight"].double() / torch.sqrt(variance.double() + 1e-5)
        assert torch.allclose(each.factor.double(), expected, rtol=1e-6)
    assert set(folded("residual")[NormStatistics].folded) <= set(nodes_by_name(folded("residual").module.graph))
