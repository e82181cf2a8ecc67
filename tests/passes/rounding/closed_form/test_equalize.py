"""Equalized networks compute what they did, with channels of like ranges."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from fxquant import flow
from fxquant.capture import capture
from fxquant.core.errors import OptionError
from fxquant.core.facts import Ranges, Rounding, Settings, Target, WeightGrids
from fxquant.core.ir import Grid, Program, Sites, WeightFormat, tensor_at
from fxquant.core.run import CalibrationSet, GraphReplay, model_outputs
from fxquant.passes.rounding import ROUNDERS, RoundingTask
from tests.passes.rounding.closed_form.test_chains import ChainNet
from tests.passes.rounding.tasks import after, task_of, task_on

equalize = ROUNDERS["equalize"]
PAIRS = [("stem", "depthwise"), ("depthwise", "grouped"), ("grouped", "first"), ("first", "second")]


@cache
def uneven() -> tuple[Program, CalibrationSet]:
    """Return a calibrated chain whose channels differ a hundredfold, one of them dead."""
    torch.manual_seed(1)
    model = ChainNet().eval()
    with torch.no_grad():
        model.stem.weight *= torch.logspace(-1, 1, 8).reshape(-1, 1, 1, 1)
        model.first.weight[2] = 0.0
    x = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    settings = Settings(bits=(2, 4, 8), target="reference", scoring_rounding="nearest")
    program = flow.prepare(capture(model, (x[:2],)), settings)
    # Shown to the observers by hand: calibration with images would scale the channels itself.
    with torch.no_grad():
        program.module(x)
    return flow.calibrate(program, None), CalibrationSet((x,))


def chain_task(*bits: int, held_out: bool = False) -> RoundingTask:
    program, images = uneven()
    return task_on(program, images, *bits, held_out=images if held_out else None)


def spread(program: Program, site: str, axis: int) -> torch.Tensor:
    weight = tensor_at(program.module, f"{site}.weight").detach()
    return weight.abs().movedim(axis, 0).flatten(1).amax(dim=1)


def test_the_float_network_computes_what_it_did() -> None:
    task = chain_task(4)
    done = equalize(task)
    before, behind = (model_outputs(program.module, task.images.inputs) for program in (task.program, done))
    assert float((before - behind).abs().max() / before.abs().max()) < 1e-5
    moved = (tensor_at(done.module, "stem.weight") / tensor_at(task.program.module, "stem.weight")).detach()
    assert float(moved.max() / moved.min()) > 10


def test_ranges_of_neighbours_match() -> None:
    done = equalize(chain_task(4))
    assert torch.allclose(spread(done, "stem", 0), spread(done, "depthwise", 0), rtol=1e-3)
    second, first = spread(done, "second", 1), spread(done, "first", 0)
    alive = first > 0
    assert int(alive.sum()) == 5
    assert torch.allclose(first[alive], second[alive], rtol=1e-3)


def test_parameters_ranges_and_grids_belong_to_the_scaled_network() -> None:
    task = chain_task(4)
    done = equalize(task)
    rounding = done[Rounding]
    assert rounding.method == "equalize"
    assert rounding.notes == (
        "the output of 'linear_1' is not equalized: value 'linear_1' is an answer of the network",
    )
    assert {f"{name}.weight" for pair in PAIRS for name in pair} <= set(rounding.parameters)
    assert "depthwise.bias" not in rounding.parameters
    for path, value in rounding.parameters.items():
        assert torch.equal(tensor_at(done.module, path), value)
    for site in done[Sites].sites:
        for chosen, grid in done[WeightGrids].grids[site.name].items():
            assert torch.equal(grid.scale, Grid.of_weight(tensor_at(done.module, site.weight), int(chosen.bits)).scale)
            assert grid.spec.bits == chosen.bits
    replay = GraphReplay(done.module)
    with torch.no_grad():
        _, values = replay.forward(task.images.inputs)
    for name, histogram in done[Ranges].histograms.items():
        value = values[replay.by_name[name]]
        assert histogram.maximum == pytest.approx(float(value.max()), rel=1e-4)
        assert histogram.minimum == pytest.approx(float(value.min()), rel=1e-4, abs=1e-6)
    assert done[Ranges].clip == task.program[Ranges].clip
    # A saved result is known by its graph.
    assert str(done.module.graph) == str(task.program.module.graph)


def test_a_target_of_one_scale_per_weight_gets_one() -> None:
    task = chain_task(4)
    target = replace(task.program[Target], per_channel=False)
    done = equalize(replace(task, program=task.program.with_facts(target)))
    for site in done[Sites].sites:
        assert len(set(done[WeightGrids].at(site.name, WeightFormat(4)).scale.tolist())) == 1


def test_the_scaled_network_is_rounded_by_what_comes_behind() -> None:
    task = chain_task(4, 2)
    done = equalize(task)
    chained = ROUNDERS["gptq"](after(task, done))
    rounding = chained[Rounding]
    assert rounding.method == "equalize+gptq"
    assert set(rounding.parameters) == set(done[Rounding].parameters)
    answer = model_outputs(after(task, chained).simulated().module, task.images.inputs)
    assert torch.isfinite(answer).all()


def test_held_out_images_decide_over_the_scaled_network() -> None:
    found = equalize(chain_task(4, held_out=True))
    (record,) = found[Rounding].units
    assert record.kept == (record.after <= record.before)
    assert bool(found[Rounding].parameters) == record.kept


def test_a_network_without_neighbours_stays_as_it_is_with_a_reason() -> None:
    task = task_of("concat", 4)
    done = equalize(task)
    (record,) = done[Rounding].units
    assert not record.kept
    assert "no two layers can be equalized" in record.reason
    assert done.module is task.program.module
    assert done[Rounding].method == "nearest"


def test_it_must_come_first() -> None:
    task = chain_task(4)
    rounded = replace(task.rounding, biases={"conv2d": torch.zeros(8)}, method="bias_correction")
    with pytest.raises(OptionError, match="put it first"):
        equalize(after(task, task.program.with_facts(rounded)))
