from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.core.errors import CalibrationError, OptionError
from fxquant.core.facts import Settings
from fxquant.recipes import COLUMNS, RECIPES, Recipe, described, settings_of, table
from tests.small import images, small

OWN = Recipe("own", "one layer after the other", "nowhere", {"solver": "greedy", "observer": "minmax"}, ("solver",))


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe that a user registers."""
    monkeypatch.setattr(RECIPES, "_entries", {**RECIPES._entries, "own": OWN})
    return OWN


def test_a_user_s_own_options_win_over_the_recipe_s() -> None:
    settings = settings_of({"bits": (3, 4), "pin_ends": False, "loss": "kl"}, recipe="clado", rounding="gptq")
    assert (settings.bits, settings.pin_ends, settings.loss, settings.rounding) == ((3, 4), False, "kl", "gptq")
    assert (settings.estimators, settings.choose, settings.recipe) == (("pairs",), "solved", "clado")


def test_a_default_that_is_given_by_name_wins_too() -> None:
    assert settings_of({"recipe": "clado", "scoring_rounding": "gptq"}).scoring_rounding == "gptq"
    # Of an object nobody knows whether a default was meant.
    assert settings_of(Settings(recipe="clado", scoring_rounding="gptq")).scoring_rounding == "nearest"
    assert settings_of(Settings(recipe="clado", seed=3)).seed == 3


def test_nothing_changes_without_a_recipe() -> None:
    assert settings_of({"seed": 4}, bits=(4,)) == Settings(seed=4, bits=(4,))
    assert settings_of() == settings_of(None, effort=None) == Settings()


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("clado", {"estimators": ("gram",)}, r"estimators=\('gram',\) contradicts recipe 'clado', which is"),
        ("brecq", {"rounding": "gptq"}, "rounding='gptq' contradicts recipe 'brecq'"),
        ("amp", {"solver": "iqp"}, "solver='iqp' contradicts recipe 'amp', which is solver='flips'"),
        ("uniform", {"choose": "measured"}, "choose='measured' contradicts"),
        ("hawk-v3", {}, r"unknown recipe 'hawk-v3' \(did you mean 'hawq-v3'\?\)"),
        ("clado", {"bits": "all"}, "'all' is not understood"),
    ],
)
def test_what_contradicts_a_recipe_is_refused(recipe: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        settings_of(options, recipe=recipe)
    with pytest.raises(OptionError, match=message):
        fxquant.quantize(small(), images(4), "average_bits=6", recipe=recipe, options=options)


def test_what_agrees_with_a_recipe_may_be_said() -> None:
    assert settings_of({"estimators": ["pairs"]}, recipe="clado") == settings_of(recipe="clado")


def test_mappings_are_laid_over_each_other_and_belong_to_their_rounding() -> None:
    tuned = settings_of({"rounding_options": {"iterations": 9}}, recipe="uwc")
    assert tuned.rounding_options == {"unit": "layers:2", "iterations": 9}
    assert settings_of({"rounding": "gptq"}, recipe="calibtip").rounding_options == {}
    pinned = settings_of({"pins": {"stem": "W8A8"}, "recipe": "clado"})
    assert list(pinned.pins) == ["stem"]


class Apart(nn.Module):
    """Two layers whose answers lie side by side, those of the second ten times as large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.small, self.large = nn.Linear(16, 12), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.small(x), 10 * self.large(x)], dim=1)


@pytest.mark.parametrize(
    ("own", "narrow"),
    [
        ({}, "small"),
        ({"loss": lambda float_output, output, _: (output - float_output)[:, :12].norm(dim=1)}, "large"),
        ({"loss": lambda float_output, output, _: (output - float_output)[:, 12:].norm(dim=1)}, "small"),
    ],
)
def test_amp_narrows_first_what_a_user_s_metric_does_not_miss(own: dict[str, Any], narrow: str) -> None:
    options = {"curve": 0, **({"estimators": ("diagonal",), **own} if own else {})}
    inputs = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    result = fxquant.quantize(
        Apart().eval(), inputs, "average_bits=7", recipe="amp", target="reference", progress=False, options=options
    )
    wide = ({"small", "large"} - {narrow}).pop()
    widths = {name: choice.weight_bits for name, choice in result.allocation.choices.items()}
    assert widths == {narrow: 4, wide: 8}


def test_a_recipe_of_one_s_own_works_by_its_name(own: Recipe) -> None:
    result = fxquant.quantize(small(), images(8), "average_bits=5", effort="fast", recipe="own", progress=False)
    settings = result.program[Settings]
    assert (settings.solver, settings.observer, settings.recipe) == ("greedy", "minmax", "own")
    assert "own" in table()
    assert described(own.name).splitlines()[0] == "own: one layer after the other"


def test_a_result_opens_where_its_recipe_is_not_known(own: Recipe, tmp_path: Any, monkeypatch: Any) -> None:
    del own
    result = fxquant.quantize(small(), images(8), "average_bits=5", effort="fast", recipe="own", progress=False)
    folder = result.save(tmp_path / "saved")
    monkeypatch.undo()
    back = fxquant.load(folder)
    assert "Recipe own\n" in back.summary() + "\n"
    assert back.report_data()["recipe"] == {"name": "own"}


@pytest.mark.parametrize(
    "change",
    [{"options": {"solvers": "iqp"}}, {"essence": ("bits",)}, {"essence": ()}, {"needs": ("luck",)}],
)
def test_rows_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    given = {"name": "x", "about": "x", "source": "x", "options": {"solver": "iqp"}, "essence": ("solver",), **change}
    with pytest.raises(OptionError):
        _ = Recipe(**given)


def test_stages_take_a_recipe() -> None:
    calibration = [(images(12), torch.arange(12) % 3)]
    program = fxquant.prepare(fxquant.capture(small(), calibration), Settings(recipe="hawq-v3", target="reference"))
    assert program[Settings].estimators == ("hawq",)
    scored = fxquant.measure_sensitivity(fxquant.calibrate(program, calibration, progress=False), calibration)
    plan = fxquant.allocate(scored, "average_bits=6.5", progress=False)[fxquant.BitAllocation]
    assert plan.estimator == "hawq"
    assert list(plan.finalists) == []


def test_labels_that_are_not_one_for_each_image_are_no_labels() -> None:
    for calibration in ([(images(4), ["a", "b", "c", "d"])], [(images(4), torch.zeros(4, 2))], images(4)):
        with pytest.raises(CalibrationError, match="hold none, or not one for each image"):
            fxquant.quantize(small(), calibration, "average_bits=6", recipe="clado", progress=False)


def test_the_table_fits_a_terminal() -> None:
    lines = table().splitlines()
    assert len(lines) == len(RECIPES) + 2
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == list(COLUMNS)
    assert "other values are refused" in described("clado")
    with pytest.raises(OptionError, match="did you mean 'clado'"):
        described("clada")
