"""One rule accepts or rejects a rounding, and no other place decides."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, Rounding
from fxquant.core.ir import FLOAT, Sites, tensor_at
from fxquant.passes.rounding import ROUNDERS, RoundingTask, acceptance, accepted, decisive, least, rejection
from fxquant.passes.rounding.closed_form import first_site, judged
from tests.passes.rounding.tasks import images, task_of

NAN, INF = math.nan, math.inf
ORDER = ast.Lt | ast.LtE | ast.Gt | ast.GtE
ROOT = Path(fxquant.__file__).parent

LOSSES = [
    (1.0, 0.5, True),
    (0.5, 1.0, False),
    (1.0, 1.0, False),
    (0.0, 0.0, False),
    (1.0, NAN, False),
    (NAN, 1.0, True),
    (NAN, NAN, False),
    (INF, 1.0, True),
    (1.0, INF, False),
    (INF, NAN, False),
    (None, None, True),
    (None, 1.0, True),
]


@pytest.mark.parametrize(("before", "after", "stays"), LOSSES)
def test_a_rounding_stays_if_the_loss_falls_or_was_not_measured(
    before: float | None, after: float | None, stays: bool
) -> None:
    assert accepted(before, after) is stays
    assert rejection(before, after, "kl").startswith("" if stays else "kl does not fall")
    assert bool(rejection(before, after, "kl")) is not stays


@pytest.mark.parametrize("after", [0.5, 2.0, None])
def test_limits_on_answers_come_before_the_loss(after: float | None) -> None:
    assert not accepted(1.0, after, keeps_before=True, keeps_after=False)
    assert accepted(1.0, after, keeps_before=False, keeps_after=True)
    assert accepted(1.0, after, False, False) is accepted(1.0, after, True, True)


@pytest.mark.parametrize("rule", [True, False])
@pytest.mark.parametrize("method", ["gptq", "bias_correction", "brecq"])
def test_algorithms_and_units_follow_it(method: str, rule: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "accepted", lambda *_: rule)
    task = task_of("plain", 2, held_out=images("plain", 5))
    found = ROUNDERS[method](replace(task, overrides={"iterations": 2, "batch": 4}))[Rounding]
    assert found.units
    assert all(unit.kept is rule for unit in found.units)


def spoilt(task: RoundingTask) -> Rounding:
    """Return a rounding to zeros."""
    sites = task.program[Sites].sites
    zeros = {site.name: torch.zeros_like(tensor_at(task.program.module, site.weight)) for site in sites}
    return replace(task.rounding, weights=zeros)


def test_a_rounding_of_higher_loss_is_rejected_and_recorded() -> None:
    task = task_of("plain", 4, held_out=images("plain", 5))
    found = judged(task, spoilt(task), "zeros", 1.5)[Rounding]
    (record,) = found.units
    assert (record.name, record.method, record.kept, record.seconds) == ("conv1", "zeros", False, 1.5)
    assert record.after > record.before > 0
    assert "mse does not fall" in record.reason
    assert not found.weights
    assert found.method == "nearest"


def test_the_best_of_several_roundings_is_kept_and_the_first_without_images() -> None:
    task = task_of("plain", 4, held_out=images("plain", 5))
    # Biases of an op other than the first are not lost to the zeros behind it.
    halves = replace(spoilt(task), biases={task.sites[-1].nodes[0]: torch.full((4,), 100.0)})
    good = replace(task.rounding, notes=("good",))
    losses = [judged(task, found, "tried", 0.0)[Rounding].units[0].after for found in (spoilt(task), halves, good)]
    assert losses[2] < losses[0] < losses[1]
    three = judged(task, (halves, good, spoilt(task)), "tried", 0.0)[Rounding]
    assert three.units[0].after == losses[2]
    assert judged(task, (halves, spoilt(task)), "tried", 0.0)[Rounding].units[0].after == losses[0]
    blind = judged(replace(task, held_out=None), (good, spoilt(task)), "tried", 0.0)[Rounding]
    assert blind.notes == ("good",)


def test_images_that_plans_are_measured_on_decide_too_and_the_plan_holds_their_loss() -> None:
    task, others = task_of("plain", 4, held_out=images("plain", 5)), images("plain", 9)
    gptq = ROUNDERS["gptq"](replace(task, held_out=None))[Rounding]
    alone, there = (judged(replace(task, held_out=each), gptq, "x", 0.0) for each in (task.held_out, others))
    both = judged(replace(task, judging=lambda: others), gptq, "x", 0.0)
    (one,), (two,), (record,) = (each[Rounding].units for each in (alone, there, both))
    assert record.before == pytest.approx(math.sqrt(one.before * two.before))
    assert record.after == pytest.approx(math.sqrt(one.after * two.after))
    plan = both[BitAllocation]
    assert record.kept
    assert (plan.measured_loss, plan.compared_loss, plan.images) == (two.after, two.before, 9)
    worse = judged(replace(task, judging=lambda: others), spoilt(task), "x", 0.0)
    assert not worse[Rounding].units[0].kept
    assert worse[BitAllocation].measured_loss == two.before


@pytest.mark.parametrize(
    ("losses", "position"), [([3.0, 1.0, 2.0], 1), ([NAN, 5.0], 1), ([1.0, 1.0], 0), ([INF, NAN], 0)]
)
def test_the_least_loss_is_taken(losses: list[float], position: int) -> None:
    assert least(losses) == position


def test_a_set_of_images_counts_by_how_much_its_loss_is_divided() -> None:
    assert decisive([4.0]) == 4.0
    assert decisive([0.5, 8.0]) == pytest.approx(2.0)
    assert accepted(decisive([1.0, 100.0]), decisive([0.4, 200.0]))
    assert not accepted(decisive([1.0, 100.0]), decisive([0.6, 200.0]))
    assert math.isnan(decisive([NAN, 1.0]))
    # A function of the user's may give any number.
    assert decisive([-1.0, 3.0]) == 1.0
    assert accepted(decisive([-1.0, -2.0]), decisive([-1.5, -2.0]))


def test_without_held_out_images_everything_is_accepted() -> None:
    task = task_of("plain", 4)
    found = judged(task, spoilt(task), "zeros", 0.0)[Rounding]
    assert found.units[0].kept
    assert found.method == "zeros"
    assert math.isnan(found.units[0].before)


def test_a_plan_in_float_has_nothing_to_round() -> None:
    task = task_of("plain", 4)
    floats = BitAllocation(dict.fromkeys(task.choices, FLOAT))
    with pytest.raises(OptionError, match="every site in float"):
        first_site(replace(task, program=task.program.with_facts(floats)))


@pytest.mark.parametrize("place", ["passes/rounding", "flow/round_weights.py", "flow/cheapest.py"])
def test_no_other_place_compares_losses(place: str) -> None:
    files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
    assert files
    # Divergence in the course of tuning is judged by training losses.
    for path in (path for path in files if path.name not in ("acceptance.py", "tune.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and any(isinstance(sign, ORDER) for sign in node.ops):
                text = ast.unparse(node)
                assert not re.search(r"before|after|loss|tried", text), f"{path}: {text}"
