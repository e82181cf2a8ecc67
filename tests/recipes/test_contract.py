"""What every recipe promises: it runs, keeps the budget, gives one answer, and uses the parts that its row names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import fxquant
from fxquant.core.errors import CalibrationError
from fxquant.core.facts import Settings
from fxquant.core.ir import Program, WeightFormat
from fxquant.core.registry import Registry
from fxquant.core.run import OBSERVERS, CalibrationSet, model_outputs
from fxquant.flow import equalize
from fxquant.passes.allocation import SOLVERS
from fxquant.passes.rounding import ROUNDERS
from fxquant.passes.sensitivity import ESTIMATORS
from fxquant.qat import TRAINERS
from fxquant.recipes import RECIPES, Recipe, listing
from fxquant.result import Result
from tests.small import images, small

IMAGES = images(24)
LABELS = torch.arange(24) % 3
BUDGET = fxquant.Budget(average_bits=6.5)
FEW = {"iterations": 3, "batch": 4}
"""Steps of learned roundings, too few to be good and enough to be used."""
SHORT = {"steps": 6, "batch": 4}
"""The same of training."""


def run(recipe: Recipe, labels: bool = True, turned: bool = False) -> Result:
    """Run a recipe on the small network.

    Args:
        recipe: which.
        labels: whether the calibration images have labels.
        turned: give them in the opposite order.
    """
    calibration = [(IMAGES, LABELS.flip(0) if turned else LABELS)] if labels else [IMAGES]
    more: dict[str, Any] = {"curve": 0, **({"rounding_options": FEW} if recipe.learned else {})}
    more |= {"training_options": SHORT} if recipe.training else {}
    return fxquant.quantize(
        small(), calibration, BUDGET, recipe=recipe.name, target="reference", progress=False, options=more
    )


@cache
def made(name: str) -> Result:
    return run(RECIPES[name])


@pytest.fixture(params=list(RECIPES))
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return RECIPES[request.param]


class Used:
    """Notes the names of registered plug-ins that are called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[str, set[str]] = defaultdict(set)
        for registry, replaced in (
            (ESTIMATORS, lambda each, note: replace(each, measure=note(each.measure))),
            (SOLVERS, lambda each, note: note(each)),
            (ROUNDERS, lambda each, note: note(each)),
            (OBSERVERS, lambda each, note: note(each)),
            (TRAINERS, lambda each, note: replace(each, train=note(each.train))),
        ):
            self._watch(monkeypatch, registry, replaced)
        self._count_gradients(monkeypatch)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, registry: Registry[Any], replaced: Callable[..., Any]) -> None:
        def noted(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
            def around(function: Callable[..., Any]) -> Callable[..., Any]:
                def call(*args: Any, **named: Any) -> Any:
                    self.names[registry.kind].add(name)
                    return function(*args, **named)

                return call

            return around

        entries = {name: replaced(entry, noted(name)) for name, entry in registry.items()}
        monkeypatch.setattr(registry, "_entries", entries)

    def _count_gradients(self, monkeypatch: pytest.MonkeyPatch) -> None:
        grad, backward = torch.autograd.grad, torch.autograd.backward

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **named: Any) -> Any:
                self.names["gradients"].add("yes")
                return function(*args, **named)

            return call

        monkeypatch.setattr(torch.autograd, "grad", counted(grad))
        monkeypatch.setattr(torch.autograd, "backward", counted(backward))

        def equalized(program: Program, images: CalibrationSet) -> Program:
            # Calibration belongs to no recipe, nor do the gradients that it takes.
            before = set(self.names["gradients"])
            done = equalize(program, images)
            self.names["gradients"] = before
            return done

        monkeypatch.setattr("fxquant.flow.pipeline.equalize", equalized)


def test_it_uses_the_parts_that_its_row_names_and_gives_the_same_answer_again(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(recipe.name)
    used = Used(monkeypatch)
    # Labels make no difference where the row asks for none.
    again = run(recipe, labels="labels" in recipe.needs)
    settings = again.program[Settings]
    assert used.names["estimator"] == set(recipe.settings.estimators)
    assert used.names["allocation solver"] == {recipe.settings.solver}
    assert used.names["rounding"] == set(recipe.rounding) - {"nearest"}
    assert used.names["training"] == {recipe.training} - {""}
    assert used.names["observer"] == {recipe.settings.observer}
    assert bool(used.names["gradients"]) == bool({"gradients", "training"} & set(recipe.needs))
    assert bool(recipe.learned or recipe.training) == ("training" in recipe.needs)
    kept = {name: getattr(settings, name) for name in recipe.options if not name.endswith("ing_options")}
    assert kept == {name: getattr(recipe.settings, name) for name in kept}
    assert dict(settings.rounding_options).items() >= dict(recipe.settings.rounding_options).items()
    assert again.allocation.to_json() == first.allocation.to_json()
    assert np.array_equal(again.sensitivity.values, first.sensitivity.values)
    answers = [model_outputs(each.simulated, (IMAGES,)) for each in (first, again)]
    assert torch.equal(*answers)


def test_it_keeps_the_budget_and_its_widths(recipe: Recipe) -> None:
    plan, settings = made(recipe.name).allocation, recipe.settings
    # Of a network with other channels the limit is restated: its average is over fewer weights, or more.
    changed = bool(settings.expand or settings.prune)
    assert changed or plan.limits["average_bits"] == 6.5
    assert 0 < plan.used["average_bits"] <= plan.limits["average_bits"]
    widths = {choice.weight_bits for choice in plan.choices.values()}
    asked = {WeightFormat.parse(bits).bits for bits in settings.bits or ()}
    assert widths <= {*asked, 8} if settings.pin_ends else widths <= asked
    inner = plan.choices["body"].weight_bits
    if settings.choose == "uniform":
        assert plan.status == "uniform"
        assert inner in asked
    else:
        # No uniform plan takes part, and no swaps: the solver's plan is the only finalist.
        assert list(plan.finalists) == [settings.estimators[0]]
        # What training chose is kept only if it loses less.
        assert plan.estimator in (*plan.finalists, recipe.estimator)
    if settings.pin_ends:
        ends = {plan.choices[name].label for name in ("stem", "head")}
        assert ends == {f"W8A{max(settings.activation_bits)}"}


@pytest.mark.parametrize("name", [name for name, each in RECIPES.items() if "labels" in each.needs])
def test_labels_are_asked_for_and_used(name: str) -> None:
    with pytest.raises(CalibrationError, match=f"recipe '{name}' judges by loss 'ce', which needs labels"):
        run(RECIPES[name], labels=False)
    turned = run(RECIPES[name], turned=True)
    assert not np.array_equal(turned.sensitivity.values, made(name).sensitivity.values)
    assert turned.sensitivity.unit == "cross-entropy nats"


def test_a_result_says_which_recipe_made_it(recipe: Recipe, tmp_path: Any) -> None:
    result = made(recipe.name)
    back = fxquant.load(result.save(tmp_path / "saved"))
    for each in (result, back):
        assert each.program[Settings].recipe == recipe.name
        assert f"Recipe {recipe.name}: " in each.summary()
        assert each.report_data()["recipe"] == {"name": recipe.name, "about": recipe.about, "source": recipe.source}
    assert torch.equal(model_outputs(back.simulated, (IMAGES,)), model_outputs(result.simulated, (IMAGES,)))


def test_the_table_has_a_row_for_it(recipe: Recipe) -> None:
    (row,) = listing(recipe.name)
    assert row["needs"] == (", ".join(recipe.needs) or "images")
    assert all(row.values())
