"""COCO's average precision of detected boxes (cocodataset.org, "Detection evaluation")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Overlaps (IoU) at which a box counts as found."""
_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image.

    Args:
        corners: `(M, 4)`: left, top, right, bottom.
        classes: `(M,)`.
        scores: `(M,)` of detected boxes; for true ones 1 where the box is a crowd, else 0.
    """

    corners: Floats
    classes: NDArray[np.int64]
    scores: Floats

    def of(self, label: int) -> tuple[Floats, Floats]:
        """Return the corners and scores of one class."""
        chosen = self.classes == label
        return self.corners[chosen], self.scores[chosen]


def overlaps(first: Floats, second: Floats, crowd: Floats | None = None) -> Floats:
    """Return `(M, K)`: `area(a and b) / area(a or b)`, for crowds b `area(a and b) / area(a)`."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    both = np.clip(high - low, 0.0, None).prod(axis=2)
    areas, others = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (first, second))
    either = areas[:, None] + others[None] - both
    if crowd is not None:
        either = np.where(crowd[None] > 0, areas[:, None], either)
    shares: Floats = both / np.maximum(either, 1e-12)
    return shares


def average_precision(found: Sequence[Boxes], true: Sequence[Boxes], most: int = 100) -> tuple[float, float]:
    """Return AP and AP50 in percent: the mean over classes that occur, and over overlaps .50:.95 or at .50.

    Precision is made monotone and read at 101 recalls. A box that matches nothing but a crowd does not count. Of each
    image the `most` boxes of highest score count.
    """
    labels = sorted({int(label) for boxes in true for label in boxes.classes[boxes.scores == 0]})
    kept = [_best(boxes, most) for boxes in found]
    table = np.array([_of_class(label, kept, true) for label in labels])
    return 100.0 * float(table.mean()), 100.0 * float(table[:, 0].mean())


def _best(boxes: Boxes, most: int) -> Boxes:
    order = np.argsort(-boxes.scores, kind="stable")[:most]
    return Boxes(boxes.corners[order], boxes.classes[order], boxes.scores[order])


def _of_class(label: int, found: Sequence[Boxes], true: Sequence[Boxes]) -> Floats:
    """Return the precision of one class at each overlap, the mean over recalls."""
    scores, hits, counted, wanted = [], [], [], 0
    for boxes, truth in zip(found, true, strict=True):
        (corners, confidence), (targets, crowd) = boxes.of(label), truth.of(label)
        hit, counts = _matched(corners, targets, crowd)
        scores.append(confidence)
        hits.append(hit)
        counted.append(counts)
        wanted += int((crowd == 0).sum())
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hit, counts = np.concatenate(hits, axis=1)[:, order], np.concatenate(counted, axis=1)[:, order]
    right, wrong = (hit & counts).cumsum(axis=1), (~hit & counts).cumsum(axis=1)
    precision = right / np.maximum(right + wrong, 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    values = np.zeros(len(THRESHOLDS))
    for k, recall in enumerate(right / wanted):
        places = np.searchsorted(recall, _RECALLS, side="left")
        values[k] = np.where(places < len(recall), np.append(precision[k], 0.0)[places], 0.0).mean()
    return values


def _matched(corners: Floats, targets: Floats, crowd: Floats) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which boxes, the best score first, find a target at each overlap, and which count."""
    hit = np.zeros((len(THRESHOLDS), len(corners)), dtype=bool)
    counts = np.ones_like(hit)
    shares = overlaps(corners, targets, crowd)
    for k, least in enumerate(THRESHOLDS):
        free = np.ones(len(targets), dtype=bool)
        for box, share in enumerate(shares):
            # A crowd may be found by many boxes, and only by those that find nothing else.
            single = np.where(free & (crowd == 0), share, -1.0)
            if len(single) and single.max() >= least:
                # The last of equals, as in pycocotools.
                free[len(single) - 1 - int(single[::-1].argmax())] = False
                hit[k, box] = True
            elif bool(((crowd > 0) & (share >= least)).any()):
                counts[k, box] = False
    return hit, counts
