from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxquant import saved_parts
from fxquant.core.errors import FileFormatError
from fxquant.core.facts import BitAllocation, SensitivityMatrix
from fxquant.core.ir import Choice, Sites
from fxquant.core.run import CalibrationSet
from tests import scoring


def test_images_are_kept_as_long_as_they_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = CalibrationSet((torch.zeros(2, 4),)), CalibrationSet((torch.zeros(9, 4),))
    monkeypatch.setattr(saved_parts, "IMAGES_LIMIT", few.bytes + many.bytes)
    assert list(saved_parts.images_that_fit({"a": few, "b": many})) == ["a", "b"]
    assert list(saved_parts.images_that_fit({"a": few, "none": None, "b": many})) == ["a"]
    monkeypatch.setattr(saved_parts, "IMAGES_LIMIT", few.bytes + many.bytes - 1)
    assert list(saved_parts.images_that_fit({"a": few, "b": many})) == ["a"]


def test_the_digest_of_a_plan_is_that_of_its_choices() -> None:
    one, other = BitAllocation({"a": Choice(4, 8)}), BitAllocation({"a": Choice(4, 8)}, objective=1.0)
    assert saved_parts.plan_digest(one) == saved_parts.plan_digest(other)
    assert saved_parts.plan_digest(one) != saved_parts.plan_digest(BitAllocation({"a": Choice(4, 8, "codebook")}))


@pytest.mark.parametrize("name", ["../up", "a/b", "", "a b"])
def test_names_that_would_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="estimator"):
        saved_parts.file_name(name)


def test_a_matrix_of_other_candidates_is_refused(tmp_path: Path) -> None:
    program = scoring.scored("plain")
    program[SensitivityMatrix].save(tmp_path / "m.npz")
    candidates = program[Sites].candidates
    assert saved_parts.load_matrix(tmp_path / "m.npz", candidates).candidates == candidates
    with pytest.raises(FileFormatError, match="belongs to another model"):
        saved_parts.load_matrix(tmp_path / "m.npz", candidates[1:])
