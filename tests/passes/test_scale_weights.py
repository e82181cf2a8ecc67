from __future__ import annotations

import pytest
import torch

from fxquant.core.facts import WeightGrids
from fxquant.core.ir import Choice, Grid, Sites, WeightFormat, tensor_at
from fxquant.passes import FindSites, ScaleWeights
from tests.programs import TARGET, calibrated, check_pass, tied


@pytest.mark.parametrize("name", ["residual", "separable", "shared", "attention", "name_clash", "tokens"])
def test_every_site_has_a_grid_at_every_width(name: str) -> None:
    program = calibrated(name)
    grids = check_pass(ScaleWeights(), program)[WeightGrids]
    for site in program[Sites].sites:
        weight = tensor_at(program.module, site.weight).detach()
        errors = []
        for bits in (2, 4, 8):
            grid = grids.at(site.name, WeightFormat(bits))
            assert grid.spec.bits == bits
            assert grid.scale.shape == (site.channels,)
            assert torch.equal(grid.scale, Grid.of_weight(weight, bits, grid.spec.channel_axis or 0).scale)
            back = grid.round_trip(weight)
            errors.append(float((back - weight).square().sum()))
        assert errors[0] > errors[1] > errors[2]


def test_a_pinned_site_still_has_the_widths_of_the_others() -> None:
    found = FindSites(TARGET, bits=(2, 4), activation_bits=(8,), pins={"fc": Choice(8, 8)})(tied("residual"))
    grids = ScaleWeights()(found)[WeightGrids]
    assert all([chosen.bits for chosen in sorted(widths)] == [2, 4, 8] for widths in grids.grids.values())
