"""Rounding a plan: chains, their acceptance, feedback into the allocation, from quantize and from reconstruct."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import fxquant
from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, Budget, Rounding, SensitivityMatrix, Surrogates, UnitRecord
from fxquant.core.host import Reporter
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import CalibrationSet
from fxquant.flow import algorithms, realised, round_plan
from fxquant.flow import allocate as search
from fxquant.flow import round_weights as front
from fxquant.passes.rounding import ROUNDERS, RoundingTask
from fxquant.passes.rounding.closed_form import judged
from fxquant.result import Result
from tests.small import images, small, small_result

SHORT: dict[str, object] = {"iterations": 60, "batch": 8, "correction": 0, "rounding_lr": 0.05}
LIMIT = Budget(average_bits=3.0)


@cache
def planned() -> Result:
    return small_result("reference", 3.0)


@cache
def tuned() -> Result:
    return fxquant.reconstruct(planned(), images(), "pdquant", options=SHORT, progress=False)


def split() -> tuple[CalibrationSet, CalibrationSet]:
    return CalibrationSet((images(),)).split(0.25, 0)


def test_a_chain_is_its_names() -> None:
    assert algorithms("equalize + pdquant") == ("equalize", "pdquant")
    assert algorithms("nearest") == ("nearest",)


@pytest.mark.parametrize("chain", ["pdquand", "equalize+pdquand", "", "pdquant+"])
def test_an_unknown_name_is_refused_before_any_work(chain: str) -> None:
    with pytest.raises(OptionError, match="pdquant"):
        algorithms(chain)
    with pytest.raises(OptionError, match="pdquant"):
        fxquant.quantize(small(), images(), LIMIT, target="reference", rounding=chain, progress=False)


def test_an_unknown_option_is_refused_before_any_work() -> None:
    def unread() -> Iterator[torch.Tensor]:
        raise AssertionError("calibration was read")
        yield images()

    with pytest.raises(OptionError, match="did you mean 'iterations'"):
        fxquant.quantize(
            small(),
            unread(),
            LIMIT,
            target="reference",
            rounding="pdquant",
            options={"rounding_options": {"iteration": 3}},
        )
    with pytest.raises(OptionError, match="did you mean 'iterations'"):
        fxquant.reconstruct(planned(), images(), options={"iteration": 3}, progress=False)


def test_quantize_rounds_as_it_is_asked(tmp_path: Path) -> None:
    made = fxquant.quantize(
        small(),
        images(),
        LIMIT,
        target="reference",
        effort="fast",
        rounding="pdquant",
        options={"rounding_options": SHORT},
        workdir=tmp_path,
        progress=False,
    )
    assert made.program[Rounding].holds_for(made.allocation.choices)
    assert made.allocation.compared_loss == pytest.approx(min(made.allocation.finalists.values()), rel=1e-5)
    assert (made.allocation.measured_loss or 1.0) < (made.allocation.compared_loss or 0.0)
    assert list((tmp_path / "rounding").glob("*/pdquant-*.npz"))


def test_reconstruct_keeps_the_plan_and_lowers_its_loss() -> None:
    before, made = planned(), tuned()
    assert made.allocation.choices == before.allocation.choices
    assert made.program[Rounding].method == "pdquant"
    assert made.allocation.finalists == before.allocation.finalists
    assert made.allocation.compared_loss == pytest.approx(before.allocation.measured_loss, rel=1e-5)
    assert any(unit.after < unit.before for unit in made.program[Rounding].units if unit.kept)
    # It was accepted on held-out images alone; over all of them little is left to gain here.
    assert (made.allocation.measured_loss or 0) < 1.01 * (before.allocation.measured_loss or 0)
    assert Rounding not in before.program


def test_a_rounded_result_survives_its_file(tmp_path: Path) -> None:
    loaded = fxquant.load(tuned().save(tmp_path))
    assert torch.equal(loaded.simulated(images()), tuned().simulated(images()))


def test_another_plan_drops_the_rounding() -> None:
    other = BitAllocation({site: Choice(8, 8) for site in tuned().allocation.choices})
    rounded, plain = tuned().with_plan(other), planned().with_plan(other)
    assert torch.equal(rounded.simulated(images()), plain.simulated(images()))
    assert not torch.equal(tuned().simulated(images()), planned().simulated(images()))


def test_a_rounding_that_does_not_help_is_rejected_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(task: RoundingTask) -> Program:
        weights = {site.name: torch.zeros_like(task.program.module.get_parameter(site.weight)) for site in task.sites}
        record = UnitRecord("stem", "worse", 0.1, 0.2, True, "", 0.0, ("stem",))
        return task.done(replace(task.rounding, weights=weights, units=(record,)), "worse")

    monkeypatch.setitem(ROUNDERS._entries, "worse", worse)
    scoring, held_out = split()
    before = planned().program
    after = round_plan(before, "worse", scoring, held_out)
    assert any("worse was rejected" in note for note in after[Rounding].notes)
    assert not after[Rounding].weights
    assert [unit.method for unit in after[Rounding].units] == ["worse"]
    assert after[BitAllocation].measured_loss == pytest.approx(before[BitAllocation].measured_loss, rel=1e-5)
    assert after[BitAllocation].compared_loss is None
    # Without images to tell, it stays.
    assert round_plan(before, "worse", scoring)[Rounding].weights


def test_a_chain_is_kept_as_far_as_it_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def zeros(task: RoundingTask) -> Program:
        weights = {site.name: torch.zeros_like(task.program.module.get_parameter(site.weight)) for site in task.sites}
        return judged(task, replace(task.rounding, weights=weights), "zeros", 0.0)

    monkeypatch.setitem(ROUNDERS._entries, "zeros", zeros)
    before, (scoring, held_out) = planned().program, split()
    alone = round_plan(before, "gptq_rescaled", scoring, held_out)
    capsys.readouterr()
    both = round_plan(before, "gptq_rescaled+zeros", scoring, held_out, reporter=Reporter())
    kept, rejected = both[Rounding].units
    assert (kept.kept, rejected.kept) == (True, False)
    assert f"loss {kept.before:.4g} -> {kept.after:.4g}\n" in capsys.readouterr().err
    assert both[Rounding].method == "gptq_rescaled"
    assert both[BitAllocation].measured_loss == pytest.approx(alone[BitAllocation].measured_loss, rel=1e-5)
    assert both[BitAllocation].compared_loss == pytest.approx(before[BitAllocation].measured_loss, rel=1e-5)
    none = round_plan(before, "zeros", scoring, held_out)
    assert none[Rounding].method == "nearest"
    assert any("zeros was rejected: " in note for note in none[Rounding].notes)
    assert none[BitAllocation].compared_loss is None


def test_each_algorithm_of_a_chain_goes_on_from_the_one_before() -> None:
    made = round_plan(planned().program, "brecq+fast", split()[0], None, overrides=SHORT)
    assert made[Rounding].method == "brecq+fast"
    assert [unit.method for unit in made[Rounding].units] == ["brecq"] * 3 + ["fast"] * 3


class TestRealised:
    """The surrogate corrected by what units really cost."""

    @staticmethod
    def with_units(*units: UnitRecord) -> tuple[Program, SensitivityMatrix, dict[str, Choice]]:
        program = planned().program
        choices = program[BitAllocation].choices
        return program.with_facts(Rounding(choices, "m", units=units)), program[SensitivityMatrix], choices

    @staticmethod
    def unit(site: str, after: float, before: float = math.nan, kept: bool = True, method: str = "m") -> UnitRecord:
        return UnitRecord(site, method, before, after, kept, "" if kept else "worse", 0.0, (site,))

    def ratios(self, program: Program, matrix: SensitivityMatrix) -> dict[str, float]:
        corrected = realised(program)[SensitivityMatrix]
        shares = np.diag(corrected.values) / np.where(np.diag(matrix.values) == 0, 1.0, np.diag(matrix.values))
        return {c.site: float(s) for c, s in zip(matrix.candidates, shares, strict=True) if s}

    def predicted(self, matrix: SensitivityMatrix, choices: dict[str, Choice], *sites: str) -> float:
        return matrix.predict({site: choices[site] for site in sites})

    def test_each_increment_is_compared_with_its_prediction(self) -> None:
        _, matrix, choices = self.with_units()
        first, both = (self.predicted(matrix, choices, *names) for names in (("stem",), ("stem", "body")))
        cases = [
            ([self.unit("stem", 0.5 * first), self.unit("body", 2 * both - 1.5 * first)], (0.5, 2.0, 1.0)),
            # A rejected unit costs what it cost before.
            ([self.unit("stem", 9 * first, before=0.5 * first, kept=False)], (0.5, 1.0, 1.0)),
            # Ratios stay within their bounds.
            ([self.unit("stem", 1000 * first)], (10.0, 1.0, 1.0)),
            ([self.unit("stem", 0.0)], (0.1, 1.0, 1.0)),
        ]
        for units, expected in cases:
            found = self.ratios(self.with_units(*units)[0], matrix)
            assert tuple(found[site] for site in ("stem", "body", "head")) == pytest.approx(expected)

    def test_a_stage_over_the_whole_network_does_not_hide_the_units(self) -> None:
        _, matrix, choices = self.with_units()
        first = self.predicted(matrix, choices, "stem")
        units = self.unit("stem", 0.5 * first), self.unit("body", 0.6 * first)
        whole = UnitRecord("stem", "network", first, 0.1 * first, True, "", 0.0, ("stem", "body", "head"))
        alone, after = (self.ratios(self.with_units(*each)[0], matrix) for each in (units, (*units, whole)))
        assert alone == after

    def test_the_matrix_stays_convex(self) -> None:
        _, matrix, choices = self.with_units()
        first = self.predicted(matrix, choices, "stem")
        program, *_ = self.with_units(self.unit("stem", 0.3 * first))
        done = realised(program)
        assert done[Surrogates].matrices.keys() == program[Surrogates].matrices.keys()
        lowest = [float(np.linalg.eigvalsh(m.values).min()) for m in (matrix, done[SensitivityMatrix])]
        assert lowest[1] >= min(0.0, 10 * lowest[0]) - 1e-12

    def test_without_measured_units_there_is_nothing_to_tell(self) -> None:
        with pytest.raises(OptionError, match="no unit of this rounding was measured"):
            realised(self.with_units(self.unit("stem", math.nan))[0])


def test_feedback_keeps_the_plan_of_the_lowest_loss_within_the_budget() -> None:
    plain = fxquant.reconstruct(planned(), images(), "brecq", options=SHORT, progress=False)
    made = fxquant.reconstruct(planned(), images(), "brecq", options=SHORT, feedback=2, progress=False)
    assert (made.allocation.measured_loss or 0) <= (plain.allocation.measured_loss or 0)
    assert made.allocation.used["average_bits"] <= 3.0
    assert made.program[Rounding].holds_for(made.allocation.choices)


def test_feedback_starts_each_plan_from_the_network_as_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Program]()

    def watched(program: Program, *_: object) -> Program:
        seen.append(program)
        done = round_plan(program, "brecq", *split(), overrides=SHORT)
        # A chain that changes the network itself, and helps.
        plan = replace(done[BitAllocation], measured_loss=1.0 / len(seen))
        changed = replace(done[Rounding], parameters={"stem.weight": torch.zeros(1)})
        return done.with_facts(plan, changed)

    monkeypatch.setattr(front, "round_plan", watched)

    def moved(program: Program, *_: object) -> Program:
        choices = {site.name: Choice(8 if len(seen) % 2 else 4, 8) for site in program[Sites].sites}
        return program.with_facts(replace(program[BitAllocation], choices=choices))

    monkeypatch.setattr(search, "allocate", moved)
    scoring, held_out = split()
    front.round_with_feedback(planned().program, "brecq", scoring, held_out, feedback=2)
    assert len(seen) == 3
    assert not any(Rounding in program and program[Rounding].parameters for program in seen)


def test_feedback_needs_limits() -> None:
    free = planned().with_plan(BitAllocation({site: Choice(4, 8) for site in planned().allocation.choices}))
    unlimited = replace(free, program=free.program.with_facts(replace(free.allocation, limits={})))
    with pytest.raises(OptionError, match="this plan has none"):
        fxquant.reconstruct(unlimited, images(), "brecq", options=SHORT, feedback=1, progress=False)
