"""The engine: what it gains, what it rolls back, and that a run is the same whole, resumed or short of memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from fxquant.backends import backend
from fxquant.core.errors import CalibrationError
from fxquant.core.facts import BitAllocation, Rounding, Statistics, WeightGrids
from fxquant.core.host import Reporter
from fxquant.core.ir import Choice, FakeQuantize, Sites, tensor_at
from fxquant.core.run import LOSSES, Span, model_outputs
from fxquant.core.storage import ScoreStore
from fxquant.passes.rounding import ROUNDERS, RoundingTask
from fxquant.passes.rounding.learned import HARM, PROFILES, corrected_inputs, engine, reconstruct, unit_verdict
from tests import scoring
from tests.models import MODELS
from tests.passes.rounding.tasks import images, task_of

T = TypeVar("T")

SHORT: dict[str, object] = {
    "iterations": 12,
    "batch": 4,
    "rounding_lr": 0.05,
    "step_lr": 2e-3,
    "prediction_where": "always",
}
STAGES = {name: options for profile in PROFILES.values() for name, options in profile.stages.items()}
"""Name of a run of the engine -> its settings, corrections cut short."""
STAGES["pdquant"] = replace(STAGES["pdquant"], correction=4)
SETTINGS = sorted(STAGES.keys() - {"pdquant-faithful"})
EVERY_BRANCH = ("adaround", "pdquant", "vit", "network")


def task(name: str, *bits: int, held_out: bool = True, **changes: object) -> RoundingTask:
    """Return a task with short settings, these among them."""
    made = task_of(name, *bits, held_out=images(name, 6) if held_out else None)
    return replace(made, loss="kl", overrides={**SHORT, **changes})


def rounded(given: RoundingTask, profile: str = "pdquant") -> Rounding:
    """Return a profile's rounding of a task; a task without a folder starts with an empty store."""
    fresh = given if given.store.folder is not None else replace(given, store=ScoreStore(None, {}))
    return reconstruct(fresh, STAGES[profile], profile)[Rounding]


@cache
def unguarded(name: str, profile: str = "pdquant", *bits: int) -> tuple[RoundingTask, Rounding]:
    given = task(name, *(bits or (2, 4)), guard=False)
    return given, rounded(given, profile)


def same(one: Rounding, other: Rounding) -> bool:
    """Whether every tensor is the same to the bit."""
    steps = [{name: grid.scale for name, grid in each.activations.items()} for each in (one, other)]
    pairs = [(one.weights, other.weights), (steps[0], steps[1])]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def loss_of(given: RoundingTask, chosen: Rounding | None = None) -> float:
    inputs = given.images.inputs
    answer = model_outputs(given.simulated(chosen).module, inputs)
    return float(LOSSES["kl"](model_outputs(given.program.module, inputs), answer, None).mean())


@pytest.mark.parametrize(
    ("name", "profile"),
    # These four go through every branch, the others are other numbers; where networks are cut is in `test_units.py`.
    [("plain", profile) for profile in SETTINGS]
    + [(name, profile) for name in ("residual", "attention", "shared") for profile in EVERY_BRANCH]
    + [(name, "pdquant") for name in MODELS if name not in ("weightless", "residual", "attention", "shared")],
)
def test_every_profile_goes_through_every_network(name: str, profile: str) -> None:
    given, found = unguarded(name, profile)
    assert set(found.weights) == {site.name for site in given.sites}
    assert found.method == profile
    assert all(unit.kept or "earlier units" in unit.reason for unit in found.units)
    assert bool(torch.isfinite(model_outputs(given.simulated(found).module, given.images.inputs)).all())


@pytest.mark.parametrize("profile", ["adaround", "brecq", "pdquant", "fast", "network"])
def test_the_loss_of_the_network_falls(profile: str) -> None:
    given = task("plain", 2, 4, guard=False, iterations=160, drop=0.0)
    if profile == "adaround":
        given = replace(given, overrides={**given.overrides, "step_lr": 0.0})
    assert loss_of(given, rounded(given, profile)) < 0.8 * loss_of(given)


@pytest.mark.parametrize("profile", ["pdquant", "fast"])
def test_weights_have_as_many_values_as_the_plan_gives_their_site(profile: str) -> None:
    given, found = unguarded("residual", profile, 2, 4, 8)
    counts = {site: max(len(set(row.tolist())) for row in w.flatten(1)) for site, w in found.weights.items()}
    bits = {site.name: given.choices[site.name].weight_bits for site in given.sites}
    assert set(bits.values()) == {2, 4, 8}
    assert all(count <= 2 ** bits[site] for site, count in counts.items())
    assert all(count > 4 for site, count in counts.items() if bits[site] > 2)


@pytest.mark.parametrize("profile", ["pdquant", "fast"])
def test_the_graph_has_the_tuned_weights_as_they_are(profile: str) -> None:
    given, found = unguarded("plain", profile)
    module = given.simulated(found).module
    for site, weight in found.weights.items():
        quantizer = module.get_submodule(f"quantize_{site}_weight")
        assert torch.allclose(quantizer(weight), weight, atol=1e-6)
        assert torch.equal(module.get_parameter(f"{site}.weight"), weight)


def test_the_guard_keeps_what_helps_held_out_images_alone() -> None:
    found = rounded(task("residual", 2, 4))
    assert {unit.kept for unit in found.units} <= {True, False}
    for unit in found.units:
        assert unit.kept or unit.after > HARM * unit.before
        assert unit.kept == (unit.reason == "")
        assert unit.seconds > 0


def test_where_nothing_is_learned_everything_stays_nearest() -> None:
    given = task("plain", 2, 4, iterations=3, rounding_lr=0.0, step_lr=0.0, level_lr=0.0)
    found = rounded(given)
    simulated, nearest = given.simulated(found).module, given.simulated().module
    assert torch.equal(*(model_outputs(m, given.images.inputs) for m in (simulated, nearest)))


def test_a_unit_that_diverges_is_rolled_back_without_images_too() -> None:
    given = task("plain", 2, 4, held_out=False, weight_lr=1e5, step_lr=1e5, guard=False)
    found = rounded(given, "fast")
    lost = [unit for unit in found.units if not unit.kept]
    assert lost
    assert all("diverged" in unit.reason for unit in lost)
    module = given.simulated().module
    for site in (site for unit in lost for site in unit.sites):
        nearest = module.get_submodule(f"quantize_{site}_weight")(module.get_parameter(f"{site}.weight"))
        assert torch.equal(found.weights[site], nearest)
        assert site not in found.grids


def test_without_held_out_images_everything_stays_unmeasured() -> None:
    found = rounded(task("plain", 2, 4, held_out=False))
    assert all(unit.kept and math.isnan(unit.before) and math.isnan(unit.after) for unit in found.units)


def test_held_out_losses_are_those_of_the_network_quantized_up_to_the_unit() -> None:
    given = task("plain", 2, 4)
    found = rounded(given)
    assert given.held_out is not None
    # The last unit makes the network whole; but for its biases, which kernels round.
    answer = model_outputs(given.simulated(found).module, given.held_out.inputs)
    reference = model_outputs(given.program.module, given.held_out.inputs)
    expected = float(LOSSES["kl"](reference, answer, None).mean())
    last = found.units[-1]
    assert (last.after if last.kept else last.before) == pytest.approx(expected, rel=0.02)


def test_units_that_do_harm_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_verdict, "HARM", 0.0)
    given = task("plain", 2, 4, iterations=3, rounding_lr=0.0, step_lr=0.0, level_lr=0.0)
    found = rounded(given)
    assert not any(unit.kept for unit in found.units)
    assert all("held-out kl" in unit.reason for unit in found.units)


def test_another_seed_gives_another_rounding() -> None:
    given, found = unguarded("residual")
    assert not same(found, rounded(replace(given, seed=1)))


class Killed(Reporter):
    """Fails at the unit with this number."""

    def __init__(self, at: int) -> None:
        super().__init__(False)
        self.at = at

    def track(self, items: Iterable[T], title: str, total: int) -> Iterator[T]:
        if f"pdquant {self.at}/" in title:
            raise KeyboardInterrupt
        yield from super().track(items, title, total)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    given = task("residual", 2, 4)
    whole = rounded(given)
    store = ScoreStore(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        rounded(replace(given, store=store, reporter=Killed(3)))
    assert len(list(tmp_path.glob("*.npz"))) == 2
    # The second process fails if it tunes a finished unit again.
    resumed = replace(given, store=ScoreStore(tmp_path, {}))
    with pytest.raises(KeyboardInterrupt):
        rounded(replace(resumed, reporter=Killed(3)))
    rounded(replace(resumed, reporter=Killed(1)))
    again = rounded(replace(resumed, store=ScoreStore(tmp_path, {}), reporter=Killed(2)))
    assert same(again, whole)
    assert [replace(unit, seconds=0.0) for unit in again.units] == [replace(u, seconds=0.0) for u in whole.units]


def with_plan(given: RoundingTask, **bits: int) -> RoundingTask:
    """Return the task with other weight bits of some sites, on the same store."""
    choices = {**given.choices, **{site: Choice(b, 8) for site, b in bits.items()}}
    return replace(given, program=given.program.with_facts(BitAllocation(choices)))


def test_a_plan_takes_over_the_units_that_it_begins_with(tmp_path: Path) -> None:
    first = replace(task("residual", 2, 4), store=ScoreStore(tmp_path, {}))
    rounded(first)
    known = {path.name for path in tmp_path.glob("*.npz")}
    last = first.sites[-1].name
    second = with_plan(first, **{last: 8})
    assert first.choices[last] != second.choices[last]
    found = rounded(replace(second, reporter=Killed(1)))
    added = {path.name for path in tmp_path.glob("*.npz")} - known
    assert 0 < len(added) < len(known)
    assert same(found, rounded(replace(second, store=ScoreStore(None, {}))))
    # From the first unit on, everything is another network.
    rounded(with_plan(first, **{first.sites[0].name: 8}))
    assert len(list(tmp_path.glob("*.npz"))) == 2 * len(known) + len(added)


def test_units_of_another_start_are_not_taken_over(tmp_path: Path) -> None:
    first = replace(task("residual", 2, 4), store=ScoreStore(tmp_path, {}))
    rounded(first, "brecq")
    known = len(list(tmp_path.glob("*.npz")))
    site = first.sites[-1]
    grid = first.program[WeightGrids].grids[site.name][first.choices[site.name].weight]
    moved = grid.dequantize(torch.zeros_like(tensor_at(first.program.module, site.weight)))
    started = replace(first.rounding, weights={site.name: moved})
    rounded(replace(first, program=first.program.with_facts(started)), "brecq")
    assert len(list(tmp_path.glob("*.npz"))) == known + 1


@pytest.mark.parametrize("keep", [None, torch.bfloat16], ids=str)
def test_little_memory_gives_nearly_the_same(keep: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = task("residual", 4, 8, guard=False, correction=0)
    plenty = rounded(given)
    monkeypatch.setattr(engine, "kept_type", lambda *_: keep)
    little = rounded(given)
    unlike = [float((little.weights[site] != weight).float().mean()) for site, weight in plenty.weights.items()]
    assert max(unlike) < 0.08
    for group, grid in plenty.activations.items():
        assert float(little.activations[group].scale) == pytest.approx(float(grid.scale), rel=0.01)


def test_correction_is_left_out_where_its_inputs_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "kept_type", lambda *_: None)
    found = rounded(task("residual", 4, guard=False))
    assert any("memory_mb" in note for note in found.notes)


def test_fewer_images_than_a_batch_are_refused() -> None:
    with pytest.raises(CalibrationError, match="draws 13 images a step and was given 12"):
        rounded(task("plain", 4, batch=13))


def test_correction_is_left_out_where_there_is_no_batch_normalisation() -> None:
    assert any("batch normalisation" in note for note in rounded(task("plain", 4)).notes)
    assert not rounded(task("residual", 4)).notes


def test_corrected_inputs_serve_every_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()

    def counted(
        span: Span, inputs: dict[str, Tensor], statistics: dict[str, Statistics], steps: int, *rest: Any
    ) -> dict[str, Tensor]:
        calls.append(steps)
        return corrected_inputs(span, inputs, statistics, steps, *rest)

    monkeypatch.setattr(engine, "corrected_inputs", counted)
    shared = ScoreStore(None, {})
    rounded(replace(task("residual", 2, 4), corrections=shared))
    once = len(calls)
    assert once == 2
    rounded(replace(task("residual", 8, 2), corrections=shared))
    assert len(calls) == once
    rounded(replace(task("residual", 8, 2, correction=5), corrections=shared))
    assert len(calls) == 2 * once


def test_statistics_of_channels_that_were_scaled_since_are_not_used() -> None:
    given = task("residual", 4, guard=False)
    scaled = replace(given.rounding, parameters={"conv1.weight": torch.ones(1), "conv2.weight": torch.ones(1)})
    found = rounded(replace(given, program=given.program.with_facts(scaled)))
    assert any("batch normalisation" in note for note in found.notes)


def test_a_second_stage_goes_on_from_the_first() -> None:
    given = task("plain", 2, 4, guard=False, iterations=40)
    first = reconstruct(given, STAGES["brecq"], "brecq")
    # Nothing is learned, so that what stays is what there was.
    idle = replace(given, program=first, overrides={**SHORT, "weight_lr": 0.0, "step_lr": 0.0})
    second = rounded(idle, "network")
    assert second.method == "brecq+network"
    for site, weight in first[Rounding].weights.items():
        assert torch.allclose(second.weights[site], weight, atol=1e-6)
    for group, grid in first[Rounding].activations.items():
        assert torch.allclose(second.activations[group].scale, grid.scale)
    assert len(second.units) == len(first[Rounding].units) + 1


def test_learned_grids_of_a_first_stage_survive_a_second_that_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_verdict, "HARM", 0.0)
    given = task("plain", 2, 4, iterations=40, guard=False)
    first = reconstruct(given, STAGES["fast"], "fast")
    idle = replace(given, program=first, overrides={**SHORT, "guard": True, "weight_lr": 0.0, "step_lr": 0.0})
    second = rounded(idle, "network")
    assert not second.units[-1].kept
    answers = [model_outputs(given.simulated(each).module, given.images.inputs) for each in (first[Rounding], second)]
    assert torch.allclose(answers[0], answers[1], atol=1e-6)


def test_features_matter_to_the_network_stage() -> None:
    courses = [rounded(task("plain", 2, 4, guard=False, feature=feature), "network") for feature in (0.0, 5.0)]
    assert not same(*courses)


@cache
def on_codebooks(method: str, level_lr: float) -> tuple[RoundingTask, Rounding]:
    """Return the task of rounding to codebooks of 2 bits, with levels found already, and what a profile makes of it."""
    program = scoring.calibrated("residual", ("2c", 8))
    plan = BitAllocation({site.name: Choice(2, 8, "codebook") for site in program[Sites].sites})
    given = RoundingTask(program.with_facts(plan), images("residual"), None, "kl")
    given = replace(given, program=ROUNDERS["qronos_rescaled"](given))
    changes = {**SHORT, "iterations": 30, "level_lr": level_lr, "weight_lr": level_lr}
    return given, rounded(replace(given, overrides=changes), method)


@pytest.mark.parametrize("method", ["adaround", "brecq", "fast"])
def test_codebooks_have_their_assignments_learned_and_levels_as_int8(method: str) -> None:
    given, found = on_codebooks(method, 0.01)
    simulated = given.simulated(found).module
    # Where even spacing errs less the levels are evenly spaced.
    uneven = [site for site in given.sites if given.rounding.grids[site.name].levels is not None]
    assert uneven
    for site in uneven:
        grid, weight = found.grids[site.name], found.weights[site.name]
        assert grid.levels is not None
        assert grid.levels.dtype == torch.int8
        assert all(len(set(row.tolist())) <= 4 for row in weight.flatten(1))
        assert torch.allclose(grid.round_trip(weight), weight, atol=1e-6)
        quantizer = simulated.get_submodule(f"quantize_{site.name}_weight")
        assert isinstance(quantizer, FakeQuantize)
        assert torch.equal(quantizer.levels if quantizer.levels is not None else torch.empty(0), grid.levels)
    fixed = on_codebooks(method, 0.0)[1]
    levels, moved = ([one.grids[s.name].levels for s in uneven] for one in (given.rounding, found))
    assert any(not torch.equal(a, b) for a, b in zip(levels, moved, strict=True) if a is not None and b is not None)
    unmoved = [fixed.grids[s.name].levels for s in uneven]
    assert all(torch.equal(a, b) for a, b in zip(levels, unmoved, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("target", ["reference", "fx_int8"])
@pytest.mark.parametrize("profile", ["pdquant", "fast"])
def test_integer_backends_compute_what_was_simulated(profile: str, target: str) -> None:
    given, found = unguarded("residual", profile, 8)
    module, inputs = given.simulated(found).module, given.images.inputs
    expected = model_outputs(module, inputs)
    answer = backend(target).compile(module, inputs)(inputs)
    assert float((answer - expected).abs().max()) < 0.02 * float(expected.abs().max())
