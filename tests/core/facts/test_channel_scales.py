"""Factors of channels: what they do to a parameter, and their file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fxquant.core.errors import CalibrationError, FileFormatError
from fxquant.core.facts import ChannelScales
from fxquant.core.storage import write_arrays

SCALES = ChannelScales(
    {"a.weight": torch.tensor([[2.0], [4.0]], dtype=torch.float64)},
    {"a.weight": torch.tensor([[1.0, 2.0, 8.0]], dtype=torch.float64), "b": torch.tensor([4.0], dtype=torch.float64)},
)


def test_a_parameter_is_multiplied_and_divided() -> None:
    found = SCALES.of("a.weight", torch.ones(2, 3))
    torch.testing.assert_close(found, torch.tensor([[2.0, 1.0, 0.25], [4.0, 2.0, 0.5]]))
    torch.testing.assert_close(SCALES.of("b", torch.ones(1)), torch.tensor([0.25]))
    assert SCALES.paths == ("a.weight", "b")


def test_powers_go_from_nothing_to_all() -> None:
    assert torch.equal(SCALES.power(0.0).of("a.weight", torch.ones(2, 3)), torch.ones(2, 3))
    half = SCALES.power(0.5).of("a.weight", torch.ones(2, 3))
    torch.testing.assert_close(half.square(), SCALES.of("a.weight", torch.ones(2, 3)))


def test_what_is_saved_loads(tmp_path: Path) -> None:
    SCALES.save(tmp_path / "channel_scales.npz")
    back = ChannelScales.load(tmp_path / "channel_scales.npz")
    for part, known in ((back.multiplied, SCALES.multiplied), (back.divided, SCALES.divided)):
        assert part.keys() == known.keys()
        assert all(torch.equal(part[path], known[path]) for path in known)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_are_positive_numbers(wrong: float) -> None:
    with pytest.raises(CalibrationError, match="finite and above 0"):
        ChannelScales({"a": torch.tensor([1.0, wrong])})


@pytest.mark.parametrize("key", ["a.weight", "added:a.weight", "divided:"])
def test_other_arrays_are_refused(tmp_path: Path, key: str) -> None:
    write_arrays(tmp_path / "channel_scales.npz", {key: np.ones(2)})
    with pytest.raises(FileFormatError, match="not an intact file of channel scales"):
        ChannelScales.load(tmp_path / "channel_scales.npz")
