"""The figures of `benchmarks.tasks`: average precision, mean intersection over union, and the networks behind them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike
from torch import nn

from benchmarks import data
from benchmarks.average_precision import Boxes, average_precision, overlaps
from benchmarks.detection import suppressed
from benchmarks.segmentation import mean_iou
from benchmarks.task import Answers, Task, torch_answers
from benchmarks.task_table import TASKS
from fxquant.core.errors import OptionError

SQUARE = [0.0, 0.0, 10.0, 10.0]
SHIFTED = [0.0, 0.0, 10.0, 6.0]
"""60 % of the square."""
ELSEWHERE = [50.0, 50.0, 60.0, 60.0]


def boxes(corners: ArrayLike, scores: ArrayLike, classes: ArrayLike | None = None) -> Boxes:
    places = np.array(corners, dtype=np.float64).reshape(-1, 4)
    labels = np.zeros(len(places)) if classes is None else classes
    return Boxes(places, np.array(labels, dtype=np.int64), np.array(scores, dtype=np.float64))


def test_overlap_is_the_share_of_the_union_and_of_a_crowd_that_of_the_box() -> None:
    first, second = np.array([SQUARE]), np.array([[5.0, 0.0, 15.0, 10.0], SHIFTED])
    assert overlaps(first, second) == pytest.approx(np.array([[1 / 3, 0.6]]))
    assert overlaps(first, second, np.array([1.0, 0.0])) == pytest.approx(np.array([[0.5, 0.6]]))


@pytest.mark.parametrize(
    ("found", "true", "ap", "ap50"),
    [
        (boxes([SQUARE], [0.9]), boxes([SQUARE], [0]), 100.0, 100.0),
        # An overlap of 0.6 counts at .50, .55 and .60.
        (boxes([SHIFTED], [0.9]), boxes([SQUARE], [0]), 30.0, 100.0),
        # Precision 1/2 at every recall: the wrong box comes first.
        (boxes([ELSEWHERE, SQUARE], [0.9, 0.8]), boxes([SQUARE], [0]), 50.0, 50.0),
        # One of two is found: 51 of 101 recalls.
        (boxes([SQUARE], [0.9]), boxes([SQUARE, ELSEWHERE], [0, 0]), 5100 / 101, 5100 / 101),
        # A second box on the same target is wrong, but behind all that is right.
        (boxes([SQUARE, SQUARE], [0.9, 0.8]), boxes([SQUARE], [0]), 100.0, 100.0),
        # The better box lies on a crowd and does not count.
        (boxes([ELSEWHERE, SQUARE], [0.9, 0.8]), boxes([SQUARE, ELSEWHERE], [0, 1]), 100.0, 100.0),
        # A class found elsewhere is no help, and one that occurs nowhere does not count.
        (boxes([SQUARE, ELSEWHERE], [0.9, 0.9], [0, 5]), boxes([SQUARE, ELSEWHERE], [0, 0], [0, 1]), 50.0, 50.0),
        (boxes([], []), boxes([SQUARE], [0]), 0.0, 0.0),
    ],
)  # fmt: skip
def test_average_precision_of_one_image(found: Boxes, true: Boxes, ap: float, ap50: float) -> None:
    assert average_precision([found], [true]) == pytest.approx((ap, ap50))


def test_boxes_of_all_images_share_one_ranking_and_only_the_best_count() -> None:
    found = [boxes([ELSEWHERE], [0.9]), boxes([SQUARE], [0.8])]
    true = [boxes([SQUARE], [0]), boxes([SQUARE], [0])]
    # Found: wrong, then right at precision 1/2 and recall 1/2.
    assert average_precision(found, true) == pytest.approx((2550 / 101, 2550 / 101))
    both = [boxes([ELSEWHERE, SQUARE], [0.9, 0.8])]
    assert average_precision(both, true[:1], most=1) == (0.0, 0.0)


def test_suppression_is_within_a_class() -> None:
    corners = torch.tensor([SQUARE, SQUARE, ELSEWHERE]) / 100
    scores = torch.tensor([[0.9, 0.0], [0.8, 0.7], [0.6, 0.0]])
    kept = suppressed(scores, corners, 100, 200, 0.05, 0.5)
    assert kept.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert kept.classes.tolist() == [0, 1, 0]
    assert kept.corners[2] == pytest.approx([50, 100, 60, 120])


def test_mean_iou_is_over_classes_that_are_true() -> None:
    # Class 0: 6 of 6 + 2 + 1; class 1: 3 of 3 + 1 + 2; class 2 is only said.
    assert mean_iou(torch.tensor([[6, 1, 1], [1, 3, 1], [0, 0, 0]])) == pytest.approx((6 / 9 + 3 / 6) / 2)


def nothing(answers: Answers, samples: int | None) -> dict[str, float]:
    del answers, samples
    return {}


def test_a_limit_names_a_contestant() -> None:
    with pytest.raises(OptionError, match="mixed 3"):
        Task("t", nn.Identity, list, nothing, "m", {"mixed 3": 1.0})


def test_lost_is_how_much_worse() -> None:
    error = Task("t", nn.Identity, list, nothing, "m", lower_is_better=True)
    assert (error.lost(12.0, 10.0), TASKS["nanodet"].lost(20.0, 22.0)) == (2.0, 2.0)


# Float figures on few samples, of which only a wrong network falls short.
@pytest.mark.parametrize(("name", "floor"), [("nanodet", 18.0), ("fastestdet", 11.0), ("deeplab", 40.0)])
@pytest.mark.skipif(data.data_folder() is None, reason="no data folder: set FXQUANT_DATA to run the real networks")
def test_float_figures(name: str, floor: float) -> None:
    task = TASKS[name]
    assert task.evaluate(torch_answers(task.model()), 6)[task.metric] > floor
