"""`fxquant analyze`: what it says before it starts, where scores are kept, and what is made of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import fxquant
from fxquant import Result
from fxquant.cli import main
from fxquant.core.facts import BudgetCurve, Surrogates

Captured = pytest.CaptureFixture[str]
MODEL = ["--model", "tests.small:small", "--calibration", "tests.small:images", "--target", "reference"]


def test_it_says_what_it_is_about_to_do_and_goes_on(tmp_path: Path, capsys: Captured) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    arguments = ["analyze", *MODEL, "--output", str(out), "--workdir", str(work), "--bits", "2,4,8"]
    arguments += ["--estimators", "pairs, gram"]
    assert main(arguments) == 0
    summary, printed = capsys.readouterr()
    assert "layers quantized" in summary
    start = printed.index(
        "9 candidates, 9 perturbations to measure on 18 images with pairs, gram; batch size 18; memory:"
    )
    assert start < printed.index("score single choices: 1 cells, 0 already finished")
    assert printed.index("score pairs of choices: 6 cells, 0 already finished") < printed.index("choices: 6 of 6 in ")
    assert re.search(r"memory: \d+\.\d MB of kept activations \(twice for pairs\), \d+\.\d MB while running", printed)
    assert list(fxquant.load(out).program[Surrogates].matrices) == ["pairs", "gram"]
    assert not (out / "scores").exists()
    assert len(list((work / "scores").glob("*.npz"))) == 7
    assert main([*arguments, "--resume"]) == 0
    assert "score pairs of choices: 6 cells, 6 already finished" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_stale_scores_are_refused_by_what_changed(tmp_path: Path, capsys: Captured) -> None:
    arguments = ["analyze", *MODEL, "--output", str(tmp_path), "--effort", "fast", "--quiet", "--resume"]
    assert main(arguments) == 0
    for more, field in (("--seed=1", "data"), ("--bits=2,8", "settings"), ("--observer=minmax", "settings")):
        assert main([*arguments, more]) == 2
        printed = capsys.readouterr().err
        assert re.search(rf"were made with another [a-z, ]*\b{field}\b", printed)
        assert "model" not in printed.split("another ")[1].split(";")[0]


def test_one_analysis_gives_a_plan_for_each_budget(tmp_path: Path, capsys: Captured) -> None:
    out, plans = tmp_path / "out", tmp_path / "plans"
    assert main(["analyze", *MODEL, "--output", str(out), "--effort", "fast", "--quiet"]) == 0
    budgets = ["--budget", "average_bits=4", "--budget", "average_bits=6,size_ratio=0.4"]
    assert main(["pareto", str(out), *budgets, "--output", str(plans)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert "average_bits=4" in {point["name"] for point in report["frontier"]["points"]}
    assert {"average_bits=4", "size_ratio=0.4, average_bits=6"} <= set(Result.load(out).program[BudgetCurve].plans)
    first, second = capsys.readouterr().out.splitlines()
    assert re.match(r"average_bits=4: \w+, loss [\d.e-]+, measured [\d.e-]+, average_bits ", first)
    assert second.startswith("size_ratio=0.4, average_bits=6: ")
    used = [json.loads((plans / f"plan_{k}.json").read_text())["used"] for k in (1, 2)]
    assert used[0]["average_bits"] <= 4 < used[1]["average_bits"] <= 6
    assert main(["pareto", str(out), "--budget", "average_bits=1"]) == 3
    assert "reachable" in capsys.readouterr().err


def test_an_unknown_estimator_is_refused(tmp_path: Path, capsys: Captured) -> None:
    assert main(["analyze", *MODEL, "--output", str(tmp_path), "--estimators", "pears"]) == 2
    assert "pears" in capsys.readouterr().err
