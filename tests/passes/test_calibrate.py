from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fxquant.core.errors import CalibrationError
from fxquant.core.facts import Ranges
from fxquant.core.ir import Program, show
from fxquant.core.run import CalibrationSet, Runner, live_bytes
from fxquant.passes import Calibrate, CollectRanges, InsertObservers, calibrate
from tests.models import MODELS
from tests.programs import check_pass, tied


def run(images: CalibrationSet, batch: int, name: str = "residual") -> Program:
    return Calibrate(images, batch)(InsertObservers("minmax")(tied(name)))


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_ranges_do_not_depend_on_the_batch(batch: int) -> None:
    images = CalibrationSet(MODELS["residual"].inputs(7))
    ranges = CollectRanges()(run(images, batch))[Ranges].histograms
    whole = CollectRanges()(run(images, 7))[Ranges].histograms
    assert list(ranges) == list(whole)
    for name, histogram in ranges.items():
        assert histogram.minimum == pytest.approx(whole[name].minimum, rel=1e-4, abs=1e-5)
        assert histogram.maximum == pytest.approx(whole[name].maximum, rel=1e-4, abs=1e-5)
        assert histogram.counts.sum() == whole[name].counts.sum()
    assert ranges["x"].minimum == float(images.inputs[0].min())


def test_the_graph_stays_as_it_is() -> None:
    prepared = InsertObservers()(tied("residual"))
    done = check_pass(Calibrate(CalibrationSet(MODELS["residual"].inputs(2))), prepared)
    assert show(done.module) == show(prepared.module)
    assert done.log[-1].rewrites == 0


@pytest.mark.parametrize(
    ("name", "images", "message"),
    [
        ("residual", torch.randn(2, 4, 8, 8), r"does not run on images of shape \[\(2, 4, 8, 8\)\]"),
        ("residual", torch.randn(2, 3), "does not run on images"),
        ("residual", torch.full((1, 3, 8, 8), 1e38), "value '.*' is not finite during calibration"),
        ("tokens", torch.full((2, 4), 99), "does not run on images of shape"),
    ],
)
def test_images_that_do_not_fit(name: str, images: torch.Tensor, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        run(CalibrationSet((images,)), 2, name)


def test_one_image_will_do() -> None:
    ranges = CollectRanges()(run(CalibrationSet(MODELS["residual"].inputs(1)), 32))[Ranges]
    assert set(ranges.histograms) == {"x", "relu", "conv2d_1", "relu_1", "conv2d_2", "mean"}


def test_large_values_go_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    images, seen = CalibrationSet(MODELS["residual"].inputs(7)), list[int]()
    batches = CalibrationSet.batches

    def noted(self: CalibrationSet, size: int) -> Iterator[CalibrationSet]:
        seen.append(size)
        return batches(self, size)

    monkeypatch.setattr(CalibrationSet, "batches", noted)
    one = live_bytes(InsertObservers("minmax")(tied("residual")).module.graph)
    assert one > 4 * 3 * 8 * 8
    for limit in (0, 3 * one, 10**9):
        monkeypatch.setattr(calibrate, "WORKING_LIMIT", limit)
        run(images, 5)
    assert seen == [1, 3, 5]


def test_too_little_memory_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    program = InsertObservers("minmax")(tied("residual"))

    def short(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(Runner, "run", short)
    with pytest.raises(RuntimeError, match="not enough memory"):
        Calibrate(CalibrationSet(MODELS["residual"].inputs(2))).run(program)
