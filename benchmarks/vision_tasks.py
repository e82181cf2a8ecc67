"""Tasks with images: detection, segmentation, super-resolution and classification."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import data, detection, segmentation
from benchmarks.task import Answers, Task
from benchmarks.zoo import NETWORKS
from benchmarks.zoo.carn_m import carn_m
from benchmarks.zoo.deeplab import deeplab
from benchmarks.zoo.fastestdet import fastestdet
from benchmarks.zoo.imdn import imdn, psnr
from benchmarks.zoo.nanodet import nanodet

_BATCH = 20


def _calibration(prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """Return COCO's train images; no network is evaluated on them."""
    return torch.cat([prepare(picture) for picture in detection.coco(detection.CALIBRATION)[0]])


def _detection(
    factory: Callable[[], nn.Module],
    prepare: Callable[[Tensor], Tensor],
    decode: detection.Decode,
    least: float,
    overlap: float,
) -> Task:
    ap = partial(detection.detection_ap, prepare=prepare, decode=decode, least=least, overlap=overlap)
    limits = {"W8A8": 0.5, "mixed 5": 1.5}
    # On 109 images, AP differs by 1 and more between files whose errors are alike.
    return Task(factory.__name__, factory, partial(_calibration, prepare), ap, "AP %", limits, seeds=5)


def _segmentation() -> Task:
    images = partial(_calibration, segmentation.deeplab_input)
    # Scores of a few cells, from which the pixels are interpolated: each is a class, as in the answer.
    options = {"loss": "kl"}
    return Task("deeplab", deeplab, images, segmentation.segmentation_iou, "mIoU %", {"W8A8": 1.0}, options)


def _classification(name: str, images: int = 128) -> Task:
    network = NETWORKS[name]

    def evaluate(answers: Answers, samples: int | None) -> dict[str, float]:
        inputs, labels = network.evaluation(samples)
        return {"top-1 %": data.accuracy(lambda x: answers((x,))[0], inputs, labels, _BATCH)}

    return Task(name, network.factory, lambda: network.calibration(images), evaluate, "top-1 %", {"W8A8": 1.0})


def _super_resolution(name: str, factory: Callable[[], nn.Module]) -> Task:
    def restored(answers: Answers) -> Callable[[Tensor], Tensor]:
        return lambda low: answers((low,))[0]

    def evaluate(answers: Answers, samples: int | None) -> dict[str, float]:
        model = restored(answers)
        return {
            "PSNR dB": psnr(model, [(low, high) for _, low, high in data.set5()][:samples]),
            "PSNR dB, CBSD68 and Urban100": psnr(model, data.bsd_urban()[:samples]),
        }

    return Task(
        name,
        factory,
        # Set5 and the crops are evaluated on; ImageNet images made small are as sharp as low-resolution ones.
        lambda: data.imagenet_calibration(48, 64) / 255.0,
        evaluate,
        "PSNR dB",
        {"W8A8": 0.1, "mixed 5": 0.3},
        {"dynamic_image": True},
    )


VISION = (
    _detection(nanodet, detection.nanodet_input, detection.nanodet_boxes, 0.02, 0.6),
    _detection(fastestdet, detection.fastestdet_input, detection.fastestdet_boxes, 0.01, 0.45),
    _segmentation(),
    _super_resolution("imdn", imdn),
    _super_resolution("carn_m", carn_m),
    _classification("efficientnet_lite0"),
    _classification("mobilenet_v2"),
    _classification("mobilenet_v1"),
    _classification("deit_tiny", 64),
)
"""Rows of `benchmarks.task_table.TASKS`."""
