"""Where the models of `benchmarks.coverage` come from: a source is a package, or networks of the data folder.

Networks of packages get random weights. A package that is not installed leaves its models out, with that reason.
"""

from __future__ import annotations

import importlib
import inspect
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.task_table import TASKS
from benchmarks.zoo import NETWORKS
from fxquant.core.errors import MissingDependencyError, OptionError

SEED = 0
CALIBRATION_IMAGES = 8
TEST_IMAGES = 8
FREE_SIZE = 128
"""Pixels for networks that take images of any size."""
LOW_SIZE = 48
"""Pixels for networks that enlarge images."""
TEXT_SIZE = (64, 192)
"""Height and width of a line of text."""
SMALLEST_SCALE = 0.1
"""Layer scales below this are drawn again: with the tiny ones that training starts from, blocks add nothing."""

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Source:
    """Where models come from.

    Args:
        make: takes a model's name, returns the model in eval mode and its inputs, those for calibration first.
        package: that must be installed; empty where none is needed.
        install: what to give to `pip install`.
    """

    make: Callable[[str], tuple[nn.Module, Inputs]]
    package: str = ""
    install: str = ""


def build(name: str) -> tuple[nn.Module, Inputs]:
    """Return a model in eval mode and its inputs, those for calibration first.

    Raises:
        OptionError: the name says no source that is known.
        MissingDependencyError: its package is not installed.
    """
    source, _, model = name.partition(":")
    if source not in SOURCES:
        raise OptionError(f"model {name!r} names no source; write one of {', '.join(f'{s}:NAME' for s in SOURCES)}")
    found = SOURCES[source]
    if found.package:
        prepare_torchvision()
        try:
            importlib.import_module(found.package)
        except ImportError as error:
            raise MissingDependencyError(
                f"{found.package} is not installed ({error}); pip install {found.install}"
            ) from error
    torch.manual_seed(SEED)
    return found.make(model)


def _from_zoo(name: str) -> tuple[nn.Module, Inputs]:
    network = NETWORKS[name]
    return network.factory(), (network.calibration(CALIBRATION_IMAGES + TEST_IMAGES),)


def _from_task(name: str) -> tuple[nn.Module, Inputs]:
    task, wanted = TASKS[name], CALIBRATION_IMAGES + TEST_IMAGES
    given = task.calibration()
    batches = [given] if isinstance(given, Tensor) else list(given) if isinstance(given, Sequence) else []
    parts = [(batch,) if isinstance(batch, Tensor) else tuple(batch) for batch in batches]
    return task.model(), tuple(torch.cat(column)[:wanted] for column in zip(*parts, strict=True))


def _from_timm(name: str) -> tuple[nn.Module, Inputs]:
    name, _, asked = name.partition("@")
    options = {key: int(value) for key, _, value in (part.partition("=") for part in asked.split(",") if part)}
    model = importlib.import_module("timm").create_model(name, pretrained=False, num_classes=100, **options)
    given = model.pretrained_cfg["input_size"][-1]
    fixed = model.pretrained_cfg.get("fixed_input_size") or not _takes(model, FREE_SIZE)
    size = given if fixed else FREE_SIZE
    images = pictures(size)
    return livelier(model, images), (images,)


def _takes(model: nn.Module, size: int) -> bool:
    """Whether a network runs on images of this size; some fix it without saying so."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def _from_torchvision(name: str) -> tuple[nn.Module, Inputs]:
    builder = importlib.import_module("torchvision.models").get_model_builder(name)
    # By default networks for segmentation load weights of a classifier, which this forbids.
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    model = builder(weights=None, num_classes=100, **backbone)
    images = pictures(getattr(model, "image_size", FREE_SIZE))
    return livelier(model, images), (images,)


def _from_smp(name: str) -> tuple[nn.Module, Inputs]:
    """Return NAME@ENCODER of Segmentation Models."""
    kind, _, encoder = name.partition("@")
    models = importlib.import_module("segmentation_models_pytorch")
    model = models.create_model(kind, encoder_name=encoder or "resnet18", encoder_weights=None, classes=21)
    images = pictures(FREE_SIZE)
    return livelier(model, images), (images,)


def _from_ultralytics(name: str) -> tuple[nn.Module, Inputs]:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    kind = {"seg": "SegmentationModel", "pose": "PoseModel"}.get(name.rpartition("-")[2], "DetectionModel")
    model = getattr(tasks, kind)(f"{name}.yaml", verbose=False)
    images = pictures(FREE_SIZE)
    return livelier(model, images), (images,)


def _from_spandrel(name: str) -> tuple[nn.Module, Inputs]:
    """Return PACKAGE.CLASS[@OPTION=NUMBER,...] of spandrel's restoration networks."""
    place, _, asked = name.partition("@")
    package, _, kind = place.partition(".")
    options = {key: int(value) for key, _, value in (part.partition("=") for part in asked.split(",") if part)}
    module = importlib.import_module(f"spandrel.architectures.{package}")
    model, images = getattr(module, kind)(**options), pictures(LOW_SIZE)
    return livelier(model, images), (images,)


class _Reader(nn.Module):
    """A text recogniser that is given images only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        answer: Tensor = self.model(image, None)
        return answer


def _from_easyocr(name: str) -> tuple[nn.Module, Inputs]:
    """Return a recogniser: convolutions, two bidirectional LSTM layers, a class for each step."""
    model = importlib.import_module(f"easyocr.model.{name}").Model(1, 256, 256, 97)
    images = pictures(TEXT_SIZE[1])[:, :1, : TEXT_SIZE[0]]
    return livelier(_Reader(model), images), (images,)


SOURCES: dict[str, Source] = {
    "zoo": Source(_from_zoo),
    "task": Source(_from_task),
    "timm": Source(_from_timm, "timm", "timm"),
    "torchvision": Source(_from_torchvision, "torchvision", "torchvision"),
    "smp": Source(_from_smp, "segmentation_models_pytorch", "segmentation-models-pytorch"),
    "ultralytics": Source(_from_ultralytics, "ultralytics", "ultralytics"),
    "spandrel": Source(_from_spandrel, "spandrel", "spandrel"),
    "easyocr": Source(_from_easyocr, "easyocr", "easyocr"),
}
"""First part of a model's name -> where it comes from."""

_DECLARED: list[object] = []


def import_sources() -> None:
    """Import the packages that models come from, as far as they are installed."""
    prepare_torchvision()
    # Ultralytics keeps its settings in a folder of the user's, which is not ours to write to.
    _ = os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
    for source in SOURCES.values():
        if source.package:
            with suppress(ImportError):
                importlib.import_module(source.package)


def prepare_torchvision() -> None:
    """Declare the ops that torchvision's Python part expects; its compiled part is built for another torch here."""
    if not _DECLARED:
        libraries: Any = torch.library
        library = libraries.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)


def pictures(size: int) -> Tensor:
    """Return seeded images `(N, 3, size, size)`: smooth blobs of unlike contrast under fine noise."""
    count, generator = CALIBRATION_IMAGES + TEST_IMAGES, torch.Generator().manual_seed(SEED)
    blobs = torch.randn(count, 3, 6, 6, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator) * 2
    smooth = functional.interpolate(blobs, size=(size, size), mode="bilinear", align_corners=False)
    return smooth + 0.2 * torch.randn(count, 3, size, size, generator=generator)


def livelier(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a model in eval mode whose random weights let something through, as a trained one's would.

    Batch norms learn their statistics from images; scales and gains that start at (nearly) nothing are drawn again.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            tiny = bool(parameter.abs().max() < SMALLEST_SCALE) and bool(parameter.max() == parameter.min())
            gain = path.endswith("weight") or float(parameter.abs().max()) > 0
            if tiny and gain:
                parameter.uniform_(0.2, 0.6, generator=generator)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        if norms:
            model(images[:CALIBRATION_IMAGES])
    return model.eval()
