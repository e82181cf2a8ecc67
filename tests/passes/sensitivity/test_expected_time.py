"""What is said of the time of scoring before it starts is what it takes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity import ESTIMATORS, Scorer, expected_seconds
from tests.scoring import inputs, scorer, simulated


def clock_of(each: Scorer, monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """Return a clock that shows how much of the network was run, on each image."""
    total, take = [0.0], each.take_spent

    def counted(images: int) -> float:
        total[0] += each.replay.spent * images
        return take(images)

    monkeypatch.setattr(each, "take_spent", counted)
    return lambda: total[0]


@pytest.mark.parametrize(
    "names", [("gram",), ("gram", "diagonal"), ("fisher_out", "gram"), ("pairs", "monotone", "fisher")]
)
def test_work_takes_what_was_said(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    images = CalibrationSet(inputs("plain", 16))
    each, other = (scorer(simulated("plain"), images) for _ in range(2))
    assert len(each.batches) == 4
    clock = clock_of(each, monkeypatch)
    said = expected_seconds(each, [ESTIMATORS[name] for name in names], clock)
    began, found = clock(), [ESTIMATORS[name](each) for name in names]
    assert said == pytest.approx(clock() - began, rel=0.1)
    for one, name in zip(found, names, strict=True):
        plain = ESTIMATORS[name](other)
        assert np.array_equal(one.values, plain.values)
        assert one.evaluations == plain.evaluations


def test_what_is_finished_takes_nothing() -> None:
    each = scorer(simulated("plain"), CalibrationSet(inputs("plain", 14)))
    _ = ESTIMATORS["gram"](each)
    assert expected_seconds(each, [ESTIMATORS["gram"]]) == 0


def test_nothing_is_said_of_work_that_depends_on_what_it_finds() -> None:
    each = scorer(simulated("plain"), CalibrationSet(inputs("plain", 14)))
    assert expected_seconds(each, [ESTIMATORS["gram"], ESTIMATORS["hybrid"]]) is None
    assert not each.store.get(f"{each.prefix}alone6-0")
    alone = scorer(simulated("plain"), CalibrationSet(inputs("plain", 4)))
    assert expected_seconds(alone, [ESTIMATORS["gram"]]) is None
    assert not alone.store.get(f"{alone.prefix}alone6-0")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_declares_its_work(name: str) -> None:
    each = scorer(simulated("plain"), CalibrationSet(inputs("plain", 14)))
    cells: list[str] = []
    for title in ("measure", "by_batch"):
        run = getattr(each, title)

        def noted(*given: object, title: str = title, run: Callable[..., object] = run) -> object:
            cells.append(title)
            return run(*given)

        setattr(each, title, noted)
    _ = ESTIMATORS[name](each)
    own = cells.count("measure") - cells.count("by_batch")
    assert own == {"batches": 0, "pairs": 1}.get(ESTIMATORS[name].work, own)
    assert ESTIMATORS[name].work == "own" or "by_batch" in cells
