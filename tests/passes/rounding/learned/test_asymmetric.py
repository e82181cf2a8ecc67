"""Asymmetric weight grids: nearer to skewed weights than symmetric ones, and refused where integers are meant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxquant.backends import to_qdq
from fxquant.core.errors import LoweringError
from fxquant.core.facts import FakeQuantNodes
from fxquant.core.ir import FakeQuantize, Grid, QuantSpec, tensor_at
from fxquant.passes.rounding.learned import POWER, asymmetric_grid, with_asymmetric_grids
from tests.passes.rounding.tasks import task_of


def skewed(channels: int = 6) -> Tensor:
    """Return weights whose channels lie more to one side the later they come."""
    generator = torch.Generator().manual_seed(0)
    shift = torch.linspace(0, 3, channels).reshape(-1, 1, 1, 1)
    return torch.randn(channels, 3, 3, 3, generator=generator) * 0.5 + shift


def error(weight: Tensor, grid: Grid) -> Tensor:
    off = (weight - grid.round_trip(weight)).abs().pow(POWER)
    return off.flatten(1).mean(dim=1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_are_no_larger_than_on_symmetric_grids(bits: int) -> None:
    weight = skewed()
    one = error(weight, Grid.of_weight(weight, bits))
    other = error(weight, asymmetric_grid(weight, QuantSpec(bits, True, False, 0)))
    assert bool((other <= one * 1.02).all())
    # Where all weights lie on one side, a symmetric grid wastes half of its values.
    assert float(other[-1]) < 0.6 * float(one[-1])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_lie_on_the_grid_and_zero_stays_exact(bits: int) -> None:
    spec = QuantSpec(bits, True, False, 0)
    for weight in (skewed(), -skewed(), torch.zeros(2, 3), torch.tensor([[1.0, 2.0], [-1.0, -4.0]])):
        grid = asymmetric_grid(weight, spec)
        scale, zero_point = grid.scale, grid.zero_point
        assert scale.shape == zero_point.shape == (len(weight),)
        assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)
        assert bool((scale > 0).all())
        assert int(zero_point.min()) >= spec.qmin
        assert int(zero_point.max()) <= spec.qmax
        assert torch.equal(grid.round_trip(torch.zeros_like(weight)), torch.zeros_like(weight))


def test_channels_may_stand_on_another_axis() -> None:
    weight = skewed().flatten(1)
    one = asymmetric_grid(weight, QuantSpec(4, True, False, 0))
    other = asymmetric_grid(weight.T.contiguous(), QuantSpec(4, True, False, 1))
    assert torch.equal(one.scale, other.scale)
    assert torch.equal(one.zero_point, other.zero_point)


def test_every_weight_gets_its_grid() -> None:
    task = task_of("shared", 4, 8)
    found = with_asymmetric_grids(task)
    assert set(found.rounding.grids) == {site.name for site in task.sites}
    module, names = found.bare().module, found.bare()[FakeQuantNodes].weights
    for site, grid in found.rounding.grids.items():
        assert (grid.spec.symmetric, grid.spec.bits) == (False, task.choices[site].weight_bits)
        for node in (node for node in module.graph.nodes if node.name in names[site]):
            quantizer = module.get_submodule(str(node.target))
            assert isinstance(quantizer, FakeQuantize)
            assert quantizer.spec == grid.spec
            assert torch.equal(quantizer.scale, grid.scale)
    # A weight rounded on another grid does not lie on this one.
    weights = {site.name: tensor_at(task.program.module, site.weight) for site in task.sites}
    earlier = task.program.with_facts(replace(task.rounding, weights=weights))
    assert not with_asymmetric_grids(replace(task, program=earlier)).rounding.weights


def test_no_integer_backend_takes_them() -> None:
    task = task_of("plain", 4, 8)
    to_qdq(task.simulated().module)
    with pytest.raises(LoweringError, match="grid"):
        to_qdq(with_asymmetric_grids(task).simulated().module)
