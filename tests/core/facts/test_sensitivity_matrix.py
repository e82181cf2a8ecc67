from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.facts import SensitivityMatrix
from fxquant.core.ir import Candidate, Choice
from fxquant.core.storage import read_arrays, write_arrays

CANDIDATES = tuple(Candidate(site, Choice(bits, 8)) for site in ("a", "b") for bits in (2, 8))
VALUES = np.array([[4.0, 0.0, 1.0, 0.5], [0.0, 0.5, 0.25, 0.0], [1.0, 0.25, 3.0, 0.0], [0.5, 0.0, 0.0, 0.25]])
MATRIX = SensitivityMatrix(CANDIDATES, VALUES, np.full((4, 4), np.nan), "pairs", 12.5, "KL nats")


def test_prediction_counts_singles_once_and_pairs_twice() -> None:
    plan = {"a": Choice(2, 8), "b": Choice(8, 8)}
    assert MATRIX.predict(plan) == 4.0 + 0.25 + 2 * 0.5
    assert MATRIX.predict({"a": Choice(2, 8)}) == 4.0
    assert MATRIX.predict({}) == 0.0


def test_columns_are_grouped_by_site() -> None:
    assert MATRIX.sites == ("a", "b")
    assert [group.tolist() for group in MATRIX.groups] == [[0, 1], [2, 3]]


def test_save_and_load(tmp_path: Path) -> None:
    MATRIX.save(tmp_path / "s.npz")
    back = SensitivityMatrix.load(tmp_path / "s.npz")
    assert back.candidates == MATRIX.candidates
    assert np.array_equal(back.values, MATRIX.values)
    assert np.isnan(back.stderr).all()
    assert (back.estimator, back.evaluations, back.unit) == ("pairs", 12.5, "KL nats")


@pytest.mark.parametrize(
    "change",
    [
        {"candidates": [["a", 4]] * 4},
        {"candidates": [["a", "W4A8"]]},
        {"candidates": [["a"]] * 4},
        {"candidates": 7},
        {"candidates": [["a", None]] * 4},
        {"evaluations": "many"},
        {"notes": None},
    ],
)
def test_headers_that_do_not_fit(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "s.npz"
    MATRIX.save(path)
    arrays = read_arrays(path)
    header = {**json.loads(str(arrays["header"])), **change}
    write_arrays(path, {**arrays, "header": np.array(json.dumps(header))})
    with pytest.raises(FileFormatError, match=r"s\.npz"):
        SensitivityMatrix.load(path)
    write_arrays(path, {"values": VALUES})
    with pytest.raises(FileFormatError, match="not an intact sensitivity file"):
        SensitivityMatrix.load(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, 3)), r"shape \(3, 3\)"),
        (VALUES * np.nan, "not finite"),
        (VALUES + np.triu(np.ones((4, 4)), 1), "not symmetric"),
    ],
)
def test_matrices_are_checked_when_made(values: NDArray[np.float64], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        replace(MATRIX, values=values)
