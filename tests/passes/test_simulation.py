from __future__ import annotations

import pytest
import torch

from fxquant import flow
from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, FakeQuantNodes, Settings
from fxquant.core.ir import FLOAT, Choice, EdgeGroups, PlanEdges, Program, QuantizedEdges, Sites, show
from fxquant.core.run import CalibrationSet
from fxquant.passes import FindEdges, simulate, widest_plan
from tests.models import MODELS
from tests.programs import captured
from tests.scoring import calibrated, inputs


def with_float(name: str, kept: str) -> Program:
    """Return a calibrated program with one site kept in float by the user."""
    settings = Settings(bits=(4, 8, 32), target="reference", keep_float=(kept,))
    return flow.calibrate(flow.prepare(captured(name), settings), CalibrationSet(inputs(name, 6)))


def plan_of(program: Program, *floats: str, bits: int = 8) -> BitAllocation:
    choices = {site.name: Choice(bits, 8) for site in program[Sites].sites}
    return BitAllocation({**choices, **dict.fromkeys(floats, FLOAT)})


@pytest.mark.parametrize(("name", "kept"), [("residual", "conv1"), ("concat", "left")])
def test_a_plan_with_float_sites_keeps_float_what_was_kept_before(name: str, kept: str) -> None:
    program = with_float(name, kept)
    first = program[Sites].sites[0].name
    plan = plan_of(program, first).choices
    done = simulate(program, BitAllocation(plan))
    assert [s.name for s in done[Sites].sites] == [s for s in plan if s != first]
    assert set(done[FakeQuantNodes].weights) == set(plan) - {first}


def test_edges_are_found_once_for_a_set_of_float_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    program = with_float("residual", "conv1")
    searches: list[frozenset[str]] = []
    run = FindEdges.run

    def counted(step: FindEdges, found: Program) -> tuple[Program, int]:
        searches.append(frozenset(step.keep_float))
        return run(step, found)

    monkeypatch.setattr(FindEdges, "run", counted)
    plans = [plan_of(program, *floats, bits=bits) for bits in (8, 4) for floats in ((), ("fc",), ("conv2", "fc"))]
    done = [simulate(program, plan) for plan in (*plans, *plans)]
    assert searches == [{"conv1", "fc"}, {"conv1", "conv2", "fc"}]
    # The same as if nothing had been kept.
    for plan, kept in zip((*plans, *plans), done, strict=True):
        fresh = simulate(program.with_facts(PlanEdges(program[PlanEdges].kept)), plan)
        assert show(kept.module) == show(fresh.module)
        for kind in (QuantizedEdges, EdgeGroups, Sites, FakeQuantNodes):
            assert kept[kind] == fresh[kind]
        example = inputs("residual", 2)
        assert torch.equal(kept.module(*example), fresh.module(*example))


def test_a_plan_for_an_unknown_site() -> None:
    program = calibrated("plain")
    with pytest.raises(OptionError, match="names sites the model does not have: nose"):
        simulate(program, BitAllocation({**widest_plan(program).choices, "nose": Choice(8, 8)}))


def test_every_weight_of_the_training_graph_learns() -> None:
    program = simulate(calibrated("residual"), widest_plan(calibrated("residual")))
    for parameter in program.module.parameters():
        parameter.grad = None
    program.module(*MODELS["residual"].inputs(4)).square().sum().backward()
    for site in program[Sites].sites:
        gradient = program.module.get_parameter(site.weight).grad
        assert gradient is not None
        assert gradient.abs().sum() > 0
