"""The pass around the estimators, which have tests of their own in `sensitivity/`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from fxquant.core.errors import CalibrationError, OptionError, PipelineError
from fxquant.core.facts import BitAllocation, SensitivityMatrix, Surrogates
from fxquant.core.ir import Program, Sites
from fxquant.core.run import CalibrationSet
from fxquant.core.storage import ScoreStore
from fxquant.passes import InsertFakeQuant, MeasureSensitivity
from tests.core.storage.test_codecs import names_in
from tests.models import MODELS
from tests.programs import calibrated, check_pass, uniform

LABELS = torch.tensor([0, 1, 1, 0, 1])


@cache
def simulated(name: str) -> Program:
    program = calibrated(name)
    return InsertFakeQuant(round_biases=False)(program.with_facts(BitAllocation(uniform(program, 8))))


def images(name: str) -> CalibrationSet:
    return CalibrationSet(MODELS[name].inputs(5), LABELS)


def measured(estimator: str, loss: str = "kl", store: ScoreStore | None = None) -> SensitivityMatrix:
    return MeasureSensitivity(images("residual"), (estimator,), loss, store)(simulated("residual"))[SensitivityMatrix]


@pytest.mark.parametrize("name", ["residual", "two_inputs", "name_clash", "shared"])
def test_several_estimators_and_the_first_is_preferred(name: str) -> None:
    done = check_pass(MeasureSensitivity(images(name), ("gram", "diagonal")), simulated(name))
    matrices = done[Surrogates].matrices
    assert list(matrices) == ["gram", "diagonal"]
    assert done[SensitivityMatrix] is matrices["gram"]
    assert np.array_equal(np.diag(matrices["gram"].values), np.diag(matrices["diagonal"].values))
    assert all(matrix.candidates == done[Sites].candidates for matrix in matrices.values())


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    fresh = measured("pairs", store=ScoreStore(tmp_path, {"m": "1"}))
    cells = names_in(tmp_path)
    for name in cells[::2]:
        if name != "identity.json":
            (tmp_path / name).unlink()
    resumed = measured("pairs", store=ScoreStore(tmp_path, {"m": "1"}))
    assert np.array_equal(fresh.values, resumed.values)
    assert names_in(tmp_path) == cells


def test_what_cannot_be_measured() -> None:
    with pytest.raises(OptionError, match=r"unknown .*'grams' \(did you mean 'gram'\?\)"):
        measured("grams")
    with pytest.raises(OptionError, match="unknown loss 'l2'"):
        measured("gram", "l2")
    without = CalibrationSet(MODELS["residual"].inputs(2))
    with pytest.raises(CalibrationError, match="loss 'ce' needs labels"):
        MeasureSensitivity(without, ("diagonal",), "ce")(simulated("residual"))
    with pytest.raises(PipelineError, match="MeasureSensitivity reads FakeQuantNodes"):
        MeasureSensitivity(without)(calibrated("residual"))
