"""Weights rounded at every width before there is a plan."""

from __future__ import annotations

import pytest
import torch

from fxquant import flow
from fxquant.core.facts import BitAllocation, SensitivityMatrix, WeightGrids
from fxquant.core.ir import Program, Sites, WeightFormat, tensor_at
from fxquant.core.run import CalibrationSet, model_outputs
from fxquant.passes import simulate
from fxquant.passes.formats import rows_of, squared_error
from fxquant.passes.rounding.closed_form import Prefix, RoundWeights, moments_of
from tests import scoring
from tests.passes.rounding.tasks import images, plan_of
from tests.programs import check_pass


@pytest.mark.parametrize("name", ["plain", "shared", "separable"])
def test_every_site_is_rounded_on_its_grid_at_every_width(name: str) -> None:
    program = scoring.calibrated(name)
    done = check_pass(RoundWeights(images(name)), program)
    for site in program[Sites].sites:
        weight = tensor_at(program.module, site.weight)
        assert {chosen.label for chosen in done[WeightGrids].grids[site.name]} == {"2", "4", "8"}
        for chosen, grid in done[WeightGrids].grids[site.name].items():
            rounded = done[WeightGrids].rounded[site.name, chosen]
            assert rounded.shape == weight.shape
            assert torch.equal(grid.round_trip(rounded), rounded)
            assert torch.equal(grid.scale, program[WeightGrids].at(site.name, chosen).scale)
    assert not program[WeightGrids].rounded


def test_outputs_of_float_inputs_are_nearer_than_with_nearest_rounding() -> None:
    program = scoring.calibrated("plain")
    grids = RoundWeights(images("plain"))(program)[WeightGrids]
    total = [0.0, 0.0]
    for site in program[Sites].sites:
        walk = Prefix(program.module, images("plain"))
        gram = moments_of(site, program.module, walk).gram
        weight = tensor_at(program.module, site.weight).detach()
        for chosen in (WeightFormat(2), WeightFormat(4)):
            grid = grids.at(site.name, chosen)
            plain = grid.round_trip(weight)
            ours, theirs = (
                float(squared_error(rows_of(weight.double() - q.double(), groups=len(gram)), gram).sum())
                for q in (grids.rounded[site.name, chosen], plain)
            )
            assert ours <= theirs * (1 + 1e-9)
            total = [total[0] + ours, total[1] + theirs]
    assert total[0] < 0.9 * total[1]


def test_scores_and_simulation_take_the_rounded_weights() -> None:
    program = scoring.calibrated("plain")
    banked = RoundWeights(images("plain"))(program)
    given = CalibrationSet(scoring.inputs("plain", 6))
    plan = plan_of(program, 2)

    def loss(of: Program) -> float:
        simulated = simulate(of.with_facts(plan), plan).module
        wanted = model_outputs(program.module, given.inputs)
        return float((model_outputs(simulated, given.inputs) - wanted).square().mean())

    assert loss(banked) < loss(program)
    scores = [flow.measure_sensitivity(each, given)[SensitivityMatrix].values for each in (program, banked)]
    low = [k for k, c in enumerate(program[Sites].candidates) if c.choice.weight_bits == 2]
    assert scores[1].diagonal()[low].sum() < scores[0].diagonal()[low].sum()
    assert BitAllocation not in banked
