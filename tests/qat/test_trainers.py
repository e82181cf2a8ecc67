"""Trainers on a small network: budgets, seeds, resumption, refusals, and what comes out runs on integers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import Result
from fxquant.core.errors import CalibrationError, FailureError, InfeasibleBudgetError, OptionError
from fxquant.core.facts import FakeQuantNodes, Rounding, Settings, WeightGrids
from fxquant.core.host import Reporter
from fxquant.core.ir import FakeQuantize, Program, Sites, resolve, tensor_at
from fxquant.core.run import LOSSES, CalibrationSet, first_tensor, model_outputs
from fxquant.core.storage import ScoreStore
from fxquant.flow import loss_in_use, train_plan, trained
from fxquant.qat import TRAINERS, Ladders, TrainingTask, aim, training_loop
from tests.small import images, small

IMAGES = images(48)
LABELS = torch.arange(48) % 3
SHORT: dict[str, object] = {"steps": 20, "batch": 8}
CHOOSING = [name for name, each in TRAINERS.items() if each.chooses]


def run(name: str, budget: str = "average_bits=3", recipe: bool = False, **more: Any) -> Result:
    asked: dict[str, Any] = {"recipe": name} if recipe else {"training": name, "bits": (2, 3, 4), "rounding": "nearest"}
    options = {"training_options": SHORT, "scoring_rounding": "nearest", "effort": "fast", "curve": 0, **asked, **more}
    return fxquant.quantize(
        small(), [(IMAGES, LABELS)], budget, progress=False, options={"target": "reference", **options}
    )


@cache
def start(budget: str = "average_bits=3") -> Result:
    """Return a plan to train."""
    options = {"bits": (2, 3, 4, 8), "scoring_rounding": "nearest", "rounding": "nearest", "curve": 0}
    return fxquant.quantize(small(), IMAGES, budget, effort="fast", target="reference", progress=False, options=options)


def task(name: str, store: ScoreStore | None = None, budget: str = "average_bits=3", **options: Any) -> TrainingTask:
    known = start(budget)
    assert known.scoring is not None
    given = TRAINERS[name].options.of({**SHORT, **options})
    loss = loss_in_use(known.program, known.scoring)
    return TrainingTask(known.program, known.scoring, loss, given, 0, store or ScoreStore(None, {}))


def split(result: Result) -> tuple[CalibrationSet, None]:
    """Return the images to train on, and none that could reject."""
    assert result.scoring is not None
    return result.scoring, None


def answers(program: Any) -> Tensor:
    return model_outputs(Result(program).simulated, (IMAGES,))


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_that_was_killed_goes_on_to_the_same_answer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_loop, "KEPT_EVERY", 3)
    straight = TRAINERS[name].train(task(name))
    drawn, seen = training_loop.drawn, list[int]()

    def failing(of: TrainingTask, phase: str, step: int) -> CalibrationSet:
        seen.append(step)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return drawn(of, phase, step)

    monkeypatch.setattr(training_loop, "drawn", failing)
    with pytest.raises(KeyboardInterrupt):
        _ = TRAINERS[name].train(task(name, ScoreStore(tmp_path, {})))
    resumed = TRAINERS[name].train(task(name, ScoreStore(tmp_path, {})))
    # The eighth step failed, and the state behind the sixth was kept.
    assert seen[:8] == [*range(7), 7]
    assert seen[8] == 6
    assert torch.equal(answers(straight), answers(resumed))
    assert straight[fxquant.BitAllocation].choices == resumed[fxquant.BitAllocation].choices


@pytest.mark.parametrize("name", TRAINERS)
def test_one_seed_gives_one_answer_and_training_helps(name: str) -> None:
    options: dict[str, Any] = {"steps": 60, "weight_lr": 2e-2, "budget": "average_bits=2.2"}
    first, again = (TRAINERS[name].train(task(name, **options)) for _ in range(2))
    assert torch.equal(answers(first), answers(again))
    loss, reference = task(name).loss, model_outputs(start().program.module, (IMAGES,))
    before, after = (
        float(loss(reference, answers(p), None).mean()) for p in (start("average_bits=2.2").program, first)
    )
    assert after < 0.7 * before
    other = TRAINERS[name].train(task(name, **options, moving=False))
    assert not torch.equal(answers(first), answers(other))


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("budget", ["average_bits=2.5", "average_bits=3.7", "size_mb=0.0003", "bops_ratio=0.03"])
def test_widths_keep_the_budget(name: str, budget: str) -> None:
    plan = TRAINERS[name].train(task(name, budget=budget))[fxquant.BitAllocation]
    assert plan.estimator == name
    for limit, most in fxquant.Budget.of(budget).limits.items():
        assert plan.used[limit] <= most
        assert plan.limits[limit] == most
        # No layer could be wider.
        ladders = Ladders.of(start(budget).program, name)
        assert min(plan.choices.values()) < max(ladders.widest.values())


@pytest.mark.parametrize("name", CHOOSING)
def test_there_must_be_something_to_choose(name: str) -> None:
    with pytest.raises(OptionError, match=f"training '{name}' chooses among evenly spaced widths; give two or more"):
        run(name, "average_bits=4", bits=(4,))


def test_a_limit_of_milliseconds_is_refused() -> None:
    program = start().program
    plan = fxquant.BitAllocation(program[fxquant.BitAllocation].choices, limits={"latency_ms": 1.0})
    with pytest.raises(OptionError, match="training 'bsq' chooses widths by costs that are counted; latency_ms is"):
        Ladders.of(program.with_facts(plan), "bsq")


def test_sites_are_narrowed_by_rank_until_the_plan_fits() -> None:
    ladders = Ladders.of(start().program, "bsq")
    order = {"stem": 0.0, "head": 1.0, "body": 2.0}
    found = ladders.narrowed(ladders.widest, lambda site, *_: order[site])
    # 36, 216 and 18 weights: body goes down last, and no further than it must.
    assert [found[name].weight_bits for name in ("stem", "head", "body")] == [2, 2, 3]
    assert ladders.excess(found) == 0 < ladders.excess({**found, "body": ladders.widest["body"]})
    with pytest.raises(InfeasibleBudgetError, match="no plan of evenly spaced widths keeps"):
        Ladders(ladders.rungs, ladders.tables, {"average_bits": 1.5}).narrowed(ladders.widest, lambda *_: 0.0)


@pytest.mark.parametrize("name", ["bsq", "dropbits"])
def test_a_trained_recipe_runs_on_integers_and_comes_back(name: str, tmp_path: Path) -> None:
    known = run(name, recipe=True, target="onnxruntime")
    # Whatever it has to beat.
    result = Result(trained(known.program, *split(known)), known.held_out)
    assert result.allocation.estimator == name
    assert result.program[Rounding].method.endswith("trained")
    assert all(pair.within for pair in fxquant.check(result, IMAGES).pairs)
    back = fxquant.load(result.save(tmp_path / "saved"))
    assert torch.equal(model_outputs(back.simulated, (IMAGES,)), model_outputs(result.simulated, (IMAGES,)))
    assert back.program[Settings].training == name
    written = result.to_onnx(tmp_path / "model.onnx")
    assert 0 < written.bytes == (tmp_path / "model.onnx").stat().st_size
    lowered = first_tensor(fxquant.lower(result, "fx_int8")(IMAGES))
    simulated = model_outputs(result.simulated, (IMAGES,))
    assert float((lowered - simulated).abs().max()) < 0.03 * float(simulated.max() - simulated.min())


def test_another_budget_is_trained_again() -> None:
    known = run("distill")
    other = fxquant.resolve(known, "average_bits=2.2", progress=False)
    assert other.program[Rounding].method == known.program[Rounding].method == "trained"
    assert other.allocation.used["average_bits"] < known.allocation.used["average_bits"]
    bare = Result(known.program)
    with pytest.raises(CalibrationError, match=r"training 'distill' needs images, .* give calibration="):
        fxquant.resolve(bare, "average_bits=4", progress=False)


def test_training_that_does_not_help_is_rejected() -> None:
    known = start()
    options = {"training": "distill", "training_options": {**SHORT, "weight_lr": 30.0}}
    program = known.program.with_facts(Settings.of(known.program[Settings], **options))
    assert known.scoring is not None
    left = trained(program, known.scoring, known.held_out)
    assert any("training distill was rejected: held-out" in note for note in left[Rounding].notes)
    assert torch.equal(answers(left), answers(known.program))


def test_labels_are_used_where_the_loss_needs_them() -> None:
    one, other = run("distill", loss="ce"), run("distill")
    assert not torch.equal(model_outputs(one.simulated, (IMAGES,)), model_outputs(other.simulated, (IMAGES,)))
    with pytest.raises(CalibrationError, match="loss 'ce' needs labels"):
        fxquant.quantize(small(), IMAGES, "average_bits=3", options={"training": "distill", "loss": "ce"})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"training_options": {"batch": 64}},
            CalibrationError,
            "takes batches of 64 images, and 36 are left to train on",
        ),
        ({"training_options": {"penalty": 1}}, OptionError, "unknown training option 'penalty'"),
        ({"training_options": {"steps": 0}}, OptionError, "steps=0 must be a whole number of at least 1"),
        ({"training": "destill"}, OptionError, "unknown training 'destill' .did you mean 'distill'"),
        (
            {"routed": True},
            OptionError,
            "gives each plan weights of its own, and routed plans share",
        ),
        ({"training": None}, OptionError, r"training_options \['batch', 'steps'\] belong to a training; name one"),
    ],
)
def test_refusals(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        run("distill", **options)


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    module = start().trainable()
    with torch.no_grad():
        tensor_at(module, "head.bias").fill_(torch.nan)
    phase = training_loop.Phase("broken", 2, [{"params": list(module.parameters()), "lr": 0.1}])
    with pytest.raises(FailureError, match="the loss is nan; train again with lower rates"):
        training_loop.train(task("distill"), module, phase)


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    known = task("distill")
    _ = TRAINERS["distill"].train(
        TrainingTask(known.program, known.images, known.loss, known.options, 0, reporter=Reporter())
    )
    assert "train: tune: 20 of 20" in capsys.readouterr().err


def test_more_images_than_the_effort_takes_are_trained_on() -> None:
    result = fxquant.quantize(
        small(),
        images(200),
        "average_bits=3",
        effort="fast",
        progress=False,
        options={"training": "distill", "training_options": SHORT, "rounding": "nearest", "target": "reference"},
    )
    assert result.scoring is not None
    assert result.held_out is not None
    assert (len(result.scoring), len(result.held_out)) == (176, 24)
    # Plans are judged on as many as without training: mixed in pairs, and the held-out ones once more.
    assert result.allocation.images == 96 + 24 + 24


@pytest.mark.parametrize("fails", [False, True])
def test_a_lower_rate_is_tried_where_the_first_does_harm(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TRAINERS["distill"]

    def failing(task: TrainingTask) -> Program:
        if fails and task.options.weight_lr > 1:
            raise FailureError("the loss is nan")
        return plain.train(task)

    monkeypatch.setattr(train_plan, "TRAINERS", {"distill": replace(plain, train=failing)})
    monkeypatch.setattr(train_plan, "RATES", (1e3, 1.0))
    known = start("average_bits=2.2")
    scoring = known.scoring
    assert scoring is not None

    def after(**options: object) -> Program:
        asked: dict[str, Any] = {"training": "distill", "training_options": {**SHORT, **options}}
        program = known.program.with_facts(Settings.of(known.program[Settings], **asked))
        return trained(program, scoring, known.held_out)

    found = after()
    if fails:
        with pytest.raises(FailureError, match="the loss is nan"):
            after(weight_lr=3.0)
    assert found[Rounding].method == "trained"
    assert not any("rejected" in note for note in found[Rounding].notes)
    assert torch.equal(answers(found), answers(after(weight_lr=3e-3)))
    # A rate that is given is the only one.
    monkeypatch.setattr(train_plan, "RATES", (1.0, 1e-3))
    assert any("rejected" in note for note in after(weight_lr=0.9)[Rounding].notes)


class Levels(nn.Module):
    """A head that two levels share, with its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = torch.relu(self.stem(x))
        coarse = torch.nn.functional.avg_pool2d(fine, 2) * 3.0
        one, other = (self.last(torch.relu(self.norm(self.head(level)))) for level in (fine, coarse))
        return one, other


def levels() -> nn.Module:
    torch.manual_seed(0)
    model = Levels()
    for _ in range(20):
        _ = model(images(24))
    return model.eval()


def test_levels_of_a_detector_get_statistics_of_their_own(tmp_path: Path) -> None:
    cheap = {"scoring_rounding": "nearest", "rounding": "nearest", "estimators": ("weight_mse",), "choose": "solved"}
    common: dict[str, Any] = {"bits": (2, 4), "effort": "fast", "target": "reference", "progress": False}
    training = {"training": "aqd", "training_options": SHORT}
    result = fxquant.quantize(levels(), IMAGES, "average_bits=4", **common, options={**cheap, **training})
    plain = fxquant.quantize(levels(), IMAGES, "average_bits=4", **common, options=cheap)
    # In float both compute the same.
    floats = [model_outputs(each.program.module, (IMAGES,)) for each in (result, plain)]
    assert torch.equal(*floats)

    def means(module: Any) -> list[Tensor]:
        found = {str(n.target) for n in module.graph.nodes if n.op == "get_attr" and "running_mean" in str(n.target)}
        return [tensor_at(module, path) for path in sorted(found)]

    assert len(means(plain.program.module)) == 1
    assert torch.equal(*means(result.program.module))
    result = Result(trained(result.program, *split(result)), result.held_out)
    fine, coarse = means(result.simulated)
    assert not torch.allclose(fine, coarse, rtol=0.01)
    assert "aqd: 2 batch norms with statistics of the quantized network" in result.program[Rounding].notes
    back = fxquant.load(result.save(tmp_path / "saved"))
    assert torch.equal(model_outputs(back.simulated, (IMAGES,)), model_outputs(result.simulated, (IMAGES,)))


def test_a_detector_without_norms_is_said_to_have_none() -> None:
    done = TRAINERS["aqd"].train(task("aqd"))
    assert any("no batch norm is left" in note for note in done[Rounding].notes)
    # What is left of the method is plain fine-tuning of a network that is quantized whole.
    assert torch.equal(answers(done), answers(TRAINERS["distill"].train(task("distill"))))


def test_targets_with_one_step_for_a_weight_keep_it() -> None:
    known = task("distill")
    program = known.program
    nodes = start().simulated_program[FakeQuantNodes]
    name = nodes.weights[program[Sites].sites[0].name][0]
    quantizer = start().simulated.get_submodule(str(resolve(start().simulated.graph, name).target))
    assert isinstance(quantizer, FakeQuantize)
    done = TRAINERS["distill"].train(known)
    learned = done[Rounding].grids[program[Sites].sites[0].name].scale
    assert not torch.equal(learned, quantizer.scale)


def test_logits_join_the_loss_where_they_are_asked_for() -> None:
    assert aim(task("distill")) is None
    both = aim(task("distill", towards="logits"))
    assert both is not None
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 9.0]])
    assert float(both(a, b, None)) == pytest.approx(float(LOSSES["kl"](a, b).mean()) + 5 * 25 / 25)
    # What all classes share does not change probabilities, and counts nevertheless.
    assert float(LOSSES["kl"](a, a + 1).mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(both(a, a + 1, None)) == pytest.approx(5 * 2 / 25)
    plain, joined = (TRAINERS["distill"].train(task("distill", towards=each)) for each in ("loss", "logits"))
    assert not torch.equal(answers(plain), answers(joined))


def test_levels_of_codebooks_are_trained() -> None:
    options = {"bits": ("2c",), "scoring_rounding": "nearest", "rounding": "nearest", "curve": 0}
    common: dict[str, Any] = {"effort": "fast", "target": "reference", "progress": False}
    known = fxquant.quantize(small(), IMAGES, "average_bits=8", **common, options=options)
    assert known.scoring is not None
    given = TRAINERS["distill"].options.of({**SHORT, "weight_lr": 1e-2})
    loss = loss_in_use(known.program, known.scoring)
    done = TRAINERS["distill"].train(TrainingTask(known.program, known.scoring, loss, given))
    before, after = (Rounding.of(p, known.allocation.choices) for p in (known.program, done))
    levels = {site: grid.levels for site, grid in after.grids.items() if grid.levels is not None}
    moved = []
    for site, found in levels.items():
        assert found.dtype == torch.int8
        assert bool((found.diff(dim=1) >= 0).all())
        earlier = before.grid_of(site, known.program[WeightGrids]).levels
        assert earlier is not None
        moved.append(not torch.equal(found, earlier))
    assert any(moved)
