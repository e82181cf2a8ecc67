from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fxquant
from fxquant.cli import main
from fxquant.core.facts import Settings
from fxquant.recipes import RECIPES, table
from tests.small import images

Captured = pytest.CaptureFixture[str]


def command(output: Path, calibration: str = "tests.small:images") -> list[str]:
    scored = ["quantize", "--model", "tests.small:small", "--calibration", calibration, "--output", str(output)]
    return [*scored, "--target", "reference", "--budget", "average_bits=6.5", "--curve", "0"]


def test_recipes_are_listed(capsys: Captured) -> None:
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out == f"{table()}\n"
    assert main(["recipes", "clado"]) == 0
    assert "source: arXiv 2307.05657" in capsys.readouterr().out
    assert main(["recipes", "--json"]) == 0
    assert [row["recipe"] for row in json.loads(capsys.readouterr().out)] == list(RECIPES)
    assert main(["recipes", "amp", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["allocation"] == "flips"
    assert main(["recipes", "clada"]) == 2
    assert "did you mean 'clado'" in capsys.readouterr().err


def test_a_recipe_by_its_flag(tmp_path: Path, capsys: Captured) -> None:
    labels = np.arange(24) % 3
    np.savez(tmp_path / "images.npz", allow_pickle=False, x=images().numpy(), y=labels)
    place = tmp_path / "out"
    # A flag that says what is the default without a recipe wins over the recipe all the same.
    flags = ["--recipe", "hawq-v3", "--scoring-rounding", "gptq"]
    assert main([*command(place, str(tmp_path / "images.npz")), *flags]) == 0
    assert "Recipe hawq-v3: " in capsys.readouterr().out
    settings = fxquant.load(place).program[Settings]
    assert (settings.recipe, settings.estimators, settings.loss) == ("hawq-v3", ("hawq",), "ce")
    assert settings.scoring_rounding == "gptq"
    assert json.loads((place / "report.json").read_text())["recipe"]["source"] == "arXiv 2011.10680"
    assert "<b>hawq-v3</b>" in (place / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "hawq-v3"], "recipe 'hawq-v3' judges by loss 'ce', which needs labels"),
        (["--recipe", "hawq"], "unknown recipe 'hawq' (did you mean 'hawq-v"),
        (["--recipe", "clado", "--estimators", "gram"], "estimators=('gram',) contradicts recipe 'clado'"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    flags: list[str], message: str, tmp_path: Path, capsys: Captured
) -> None:
    assert main([*command(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.npz"))
