"""Every factor that is found leaves the answer as it was, and none is missed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.capture import capture
from fxquant.core.facts import ChannelScales
from fxquant.core.ir import Program
from fxquant.core.run import GraphReplay
from fxquant.passes import Canonicalize, FoldBatchnorm, FoldConstants, scaled
from fxquant.passes.equalization import ChannelFactors, channel_factors
from tests.passes.equalization.networks import NETWORKS, images, network


def _program(name: str) -> Program:
    program = capture(network(name), (images(2),))
    for step in (Canonicalize(), FoldConstants(), FoldBatchnorm()):
        program = step(program)
    return program


def _scales(factors: ChannelFactors, seed: int) -> tuple[ChannelScales, Tensor]:
    values = torch.randn(factors.count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()
    values[0] = 1
    over, under = (
        {path: values[uses[k]] for path, uses in factors.parameters.items() if uses[k] is not None} for k in (0, 1)
    )
    return ChannelScales(over, under), values


@pytest.mark.parametrize("name", NETWORKS)
def test_values_take_their_factors_and_the_answer_none(name: str) -> None:
    program, x = _program(name), (images(),)
    factors = channel_factors(program.module, x)
    assert factors.count - 1 == NETWORKS[name][1]
    scales, values = _scales(factors, seed=0)
    changed = scaled(program, scales)
    (before, old), (after, new) = (GraphReplay(each.module).forward(x) for each in (program, changed))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    there = {node.name: value for node, value in new.items()}
    for node, value in old.items():
        if node.name in factors.values and isinstance(value, Tensor):
            wanted = (value * values[factors.values[node.name]]).float()
            torch.testing.assert_close(there[node.name], wanted, rtol=1e-4, atol=1e-4)


def test_the_weights_of_the_given_program_stay() -> None:
    program, x = _program("residual"), (images(),)
    before = {name: value.clone() for name, value in program.module.state_dict().items()}
    _ = scaled(program, _scales(channel_factors(program.module, x), 0)[0])
    assert all(torch.equal(before[name], value) for name, value in program.module.state_dict().items())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), name=st.sampled_from(["attention", "grouped", "joined"]))
def test_any_factors_leave_the_answer(seed: int, name: str) -> None:
    program, x = _program(name), (images(),)
    changed = scaled(program, _scales(channel_factors(program.module, x), seed)[0])
    torch.testing.assert_close(changed.module(*x), program.module(*x), rtol=1e-3, atol=1e-4)
