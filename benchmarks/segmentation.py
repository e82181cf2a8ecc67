"""Masks of PASCAL VOC's classes on COCO images, and the mean intersection over union."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data import pictures_of, read_arrays
from benchmarks.detection import EVALUATION, coco
from benchmarks.task import Answers

SIZE = 513
_GREY = 127.5


def deeplab_input(picture: Tensor) -> Tensor:
    """Return `(1, 3, 513, 513)` in -1..1: the picture at 513 on its long side, top left on grey."""
    height, width = picture.shape[:2]
    scale = SIZE / max(height, width)
    size = (round(height * scale), round(width * scale))
    planes = F.interpolate(picture.permute(2, 0, 1)[None].float(), size, mode="bilinear")
    padded = F.pad(planes, (0, SIZE - size[1], 0, SIZE - size[0]), value=_GREY)
    return padded / 127.5 - 1.0


def mean_iou(counts: Tensor) -> float:
    """Return the mean of `true and said / (true or said)`, 0..1, of a table of pixels (true, said).

    Over the classes that are true somewhere: one of the 21 is on no image.
    """
    occurs = counts.sum(1) > 0
    both, either = counts.diagonal().double(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    return float((both[occurs] / either[occurs]).mean())


def segmentation_iou(answers: Answers, samples: int | None) -> dict[str, float]:
    """Return mIoU and pixel accuracy (%) of a network of class scores on `samples` of 65 images, None for all.

    Raises:
        FileFormatError: the data are missing.
    """
    arrays = read_arrays("segmentation/voc21_masks_dev.npz")
    numbers = read_arrays(EVALUATION)["image_id"].tolist()
    pictures, classes = coco(EVALUATION)[0], len(arrays["names"])
    masks = pictures_of(arrays["png"], arrays["offset"], mode="L")
    counts = torch.zeros(classes * classes, dtype=torch.long)
    for number, mask in list(zip(arrays["image_id"].tolist(), masks, strict=True))[:samples]:
        picture = pictures[numbers.index(number)]
        scores = F.interpolate(answers((deeplab_input(picture),))[0], SIZE, mode="bilinear", align_corners=True)
        height, width = picture.shape[:2]
        scale = SIZE / max(height, width)
        inside = scores[:, :, : round(height * scale), : round(width * scale)]
        said = F.interpolate(inside, (height, width), mode="bilinear").argmax(1)[0]
        known = mask < classes
        counts += torch.bincount(mask[known].long() * classes + said[known], minlength=classes * classes)
    table = counts.view(classes, classes)
    return {"mIoU %": 100 * mean_iou(table), "pixels %": 100 * float(table.diagonal().sum() / table.sum())}
