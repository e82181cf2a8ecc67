"""Images and boxes of COCO, and what turns the raw answers of the two detectors into boxes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.average_precision import Boxes, average_precision, overlaps
from benchmarks.data import pictures_of, read_arrays
from benchmarks.task import Answers
from benchmarks.zoo.nanodet import BINS

Decode = Callable[[tuple[Tensor, ...]], tuple[Tensor, Tensor]]
"""Answers for one image -> scores `(M, C)` and corners `(M, 4)` as shares of width and height."""

EVALUATION, CALIBRATION = "detection/coco_val_dev.npz", "detection/coco_train_calib20.npz"

_NANODET_MEAN = (103.53, 116.28, 123.675)
_NANODET_DEVIATION = (57.375, 57.12, 58.395)
_MOST_CANDIDATES = 1000


@cache
def coco(relative: str) -> tuple[list[Tensor], list[Boxes]]:
    """Return pictures `(H, W, 3)` uint8 and their true boxes.

    Raises:
        FileFormatError: the data are missing.
    """
    arrays = read_arrays(relative)
    truth = [
        Boxes(part[:, :4].astype(np.float64), part[:, 4].astype(np.int64), part[:, 5].astype(np.float64))
        for part in (arrays["boxes"][a:b] for a, b in pairwise(arrays["box_offset"].tolist()))
    ]
    return pictures_of(arrays["jpeg"], arrays["offset"]), truth


def stretched(picture: Tensor, size: int) -> Tensor:
    """Return a picture as `(1, 3, size, size)` in 0..255, blue first, in whole steps as an image library makes it."""
    planes = picture.permute(2, 0, 1).flip(0)[None].float()
    return F.interpolate(planes, (size, size), mode="bilinear", antialias=True).round()


def nanodet_input(picture: Tensor) -> Tensor:
    """Return what NanoDet takes, `(1, 3, 320, 320)`."""
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (_NANODET_MEAN, _NANODET_DEVIATION))
    return (stretched(picture, 320) - mean) / deviation


def fastestdet_input(picture: Tensor) -> Tensor:
    """Return what FastestDet takes, `(1, 3, 352, 352)` in 0..1."""
    return stretched(picture, 352) / 255.0


def nanodet_boxes(answers: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return scores and corners of NanoDet's answers: distances from cell centres, each the mean of 8 bins."""
    scores, distances = answers[0][0], answers[1][0]
    strides = [(8, 40), (16, 20), (32, 10)]
    centres = torch.cat(
        [torch.cartesian_prod(*[(torch.arange(n) + 0.5) * stride] * 2).flip(1) for stride, n in strides]
    )
    scale = torch.cat([torch.full((n * n, 1), float(stride)) for stride, n in strides])
    sides = distances.view(-1, 4, BINS).softmax(2) @ torch.arange(float(BINS)) * scale
    return scores, torch.cat((centres - sides[:, :2], centres + sides[:, 2:]), 1) / 320.0


def fastestdet_boxes(answers: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return scores and corners of FastestDet's answers: `obj^0.6 cls^0.4`."""
    objects, boxes, classes = (answer[0].flatten(1).T for answer in answers)
    cells = answers[0].shape[-1]
    corner = torch.cartesian_prod(*[torch.arange(float(cells))] * 2).flip(1)
    centre, size = (corner + boxes[:, :2].tanh()) / cells, boxes[:, 2:].sigmoid()
    return objects**0.6 * classes**0.4, torch.cat((centre - size / 2, centre + size / 2), 1)


def suppressed(scores: Tensor, corners: Tensor, width: int, height: int, least: float, overlap: float) -> Boxes:
    """Return the boxes above a score that overlap no better one of their class by more than a share (greedy NMS)."""
    rows, labels = (scores > least).nonzero(as_tuple=True)
    order = scores[rows, labels].argsort(descending=True, stable=True)[:_MOST_CANDIDATES]
    rows, labels = rows[order], labels[order]
    places = (corners[rows] * torch.tensor([width, height, width, height])).double().numpy()
    classes = labels.numpy()
    close = (overlaps(places, places) > overlap) & (classes[:, None] == classes[None])
    alive = np.ones(len(places), dtype=bool)
    for k in range(len(places)):
        if alive[k]:
            alive[k + 1 :] &= ~close[k, k + 1 :]
    return Boxes(places[alive], classes[alive], scores[rows, labels].double().numpy()[alive])


def detection_ap(
    answers: Answers,
    samples: int | None,
    prepare: Callable[[Tensor], Tensor],
    decode: Decode,
    least: float,
    overlap: float,
) -> dict[str, float]:
    """Return AP and AP50 (%) of a detector on `samples` of the 109 images of COCO's validation set, None for all.

    Args:
        answers: runs the detector on one image.
        samples: images.
        prepare: makes its input of a picture.
        decode: makes scores and corners of its answers.
        least: score below which boxes are dropped.
        overlap: share above which the worse of two boxes is dropped.
    """
    pictures, truth = coco(EVALUATION)
    found = []
    for picture in pictures[:samples]:
        scores, corners = decode(answers((prepare(picture),)))
        height, width = picture.shape[:2]
        found.append(suppressed(scores, corners, width, height, least, overlap))
    whole, half = average_precision(found, truth[:samples])
    return {"AP %": whole, "AP50 %": half}
