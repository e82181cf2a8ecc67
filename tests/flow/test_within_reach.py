"""Narrower formats join the candidates where the default ones cannot keep a budget, and only there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxquant import flow
from fxquant.backends import backend
from fxquant.capture import capture
from fxquant.core.errors import InfeasibleBudgetError
from fxquant.core.facts import Budget, Settings
from fxquant.core.host import SILENT
from fxquant.core.ir import Program, Sites
from fxquant.core.run import CalibrationSet

IMAGES = CalibrationSet((torch.randn(8, 160, generator=torch.Generator().manual_seed(0)),))


def _within(budget: Budget, settings: Settings) -> tuple[Program, tuple[str, ...]]:
    torch.manual_seed(0)
    # Wide enough that scales and tables take little beside the weights.
    model = torch.nn.Sequential(torch.nn.Linear(160, 48), torch.nn.ReLU(), torch.nn.Linear(48, 16)).eval()
    return flow.calibrate_within(capture(model, IMAGES.inputs), settings, IMAGES, budget, SILENT)


def _formats(program: Program) -> set[str]:
    return {choice.weight.label for site in program[Sites].sites for choice in site.choices}


def test_default_formats_that_reach_the_budget_stay_alone() -> None:
    program, notes = _within(Budget(average_bits=4), Settings(scoring_rounding="nearest"))
    assert _formats(program) == {"2c", "3c", "4", "6", "8"}
    assert not notes


def test_narrower_formats_join_where_the_budget_asks_for_them() -> None:
    program, notes = _within(Budget(average_bits=1.7), Settings(scoring_rounding="nearest"))
    assert _formats(program) == {"1c", "1.6c", "2.4c", "2c", "3c", "4", "6", "8"}
    assert notes == ("no plan of the default formats keeps average_bits=1.7, so 1c, 1.6c and 2.4c are candidates too",)
    flow.check_budget(program, Budget(average_bits=1.7))


def test_formats_that_the_user_named_are_the_only_ones() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"average_bits=1\.7 \(reachable: 2"):
        _within(Budget(average_bits=1.7), Settings(bits=(2, 4, 8), scoring_rounding="nearest"))


def test_a_target_without_codebooks_has_no_narrower_formats() -> None:
    target = backend("onnxruntime").target
    assert target.narrower_bits == ("1c", "1.6c", "2.4c")
    assert replace(target, weight_formats=()).narrower_bits == ()


def test_a_budget_out_of_reach_of_all_formats_names_what_they_reach() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"average_bits=0\.5 \(reachable: 1\."):
        _within(Budget(average_bits=0.5), Settings(scoring_rounding="nearest"))
