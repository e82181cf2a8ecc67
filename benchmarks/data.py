"""The images and labels every benchmark shares, read from the data folder and never shipped.

Loaders return `(images, labels)`: images float32 `(N, C, H, W)` in the raw range 0..255 unless stated,
labels int64 `(N,)`. A network's own preprocessing is one of the functions of `benchmarks.preprocessing`.
The folder is `FXQUANT_DATA`, or `shared/data` beside the repository; its README names every source.
"""

from __future__ import annotations

import csv
import io
import os
import zipfile
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.storage import codecs as store

Labelled = tuple[Tensor, Tensor]
Preprocessing = Callable[[Tensor], Tensor]

_NATIVE_SIZE = 224
_VAL_IMAGES = 1300
_CALIBRATION_IMAGES = 1000


def data_folder() -> Path | None:
    """Return the folder with weights and images, or None where this machine has none."""
    named = os.environ.get("FXQUANT_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


def data_file(relative: str) -> Path:
    """Return the path of one file of the data folder.

    Raises:
        FileFormatError: the folder or the file is missing.
    """
    folder = data_folder()
    if folder is None:
        raise FileFormatError("the benchmark data folder is missing; set FXQUANT_DATA to it")
    path = folder / relative
    if not path.is_file():
        raise FileFormatError(f"{path} is missing; set FXQUANT_DATA to a folder that holds {relative}")
    return path


def read_arrays(relative: str) -> dict[str, NDArray[np.generic]]:
    """Return every array of one npz file of the data folder, by key.

    Raises:
        FileFormatError: the file is missing, damaged or holds pickled objects.
    """
    return store.read_arrays(data_file(relative))


@cache
def _cifar_arrays() -> dict[str, NDArray[np.generic]]:
    return read_arrays("cifar10/cifar10_lossless.npz")


def cifar10(split: Literal["test", "train"]) -> Labelled:
    """Return CIFAR-10 images `(N, 3, 32, 32)`: the first 1017 of the test set, or 8068 of the train set.

    The released networks fit their train images almost perfectly, so "train" serves calibration only.

    Raises:
        FileFormatError: the data are missing.
        OptionError: `split` is neither "test" nor "train".
    """
    if split not in ("test", "train"):
        raise OptionError(f"unknown CIFAR-10 split {split!r}; allowed: 'test', 'train'")
    arrays = _cifar_arrays()
    images = torch.from_numpy(arrays[f"{split}_x"]).permute(0, 3, 1, 2).float().contiguous()
    return images, torch.from_numpy(arrays[f"{split}_y"]).long()


def cifar10_calibration(count: int = 256, seed: int = 0) -> Tensor:
    """Return `count` train images `(count, 3, 32, 32)` drawn evenly over the classes' balanced subset.

    Raises:
        FileFormatError: the data are missing.
    """
    arrays = _cifar_arrays()
    order = _cifar_order(count, seed)
    return torch.from_numpy(arrays["train_x"][order]).permute(0, 3, 1, 2).float().contiguous()


def cifar10_calibration_labels(count: int = 256, seed: int = 0) -> Tensor:
    """Return the labels of these images, int64 `(count,)`, for methods that need them.

    Raises:
        FileFormatError: the data are missing.
    """
    return torch.from_numpy(_cifar_arrays()["train_y"][_cifar_order(count, seed)]).long()


def _cifar_order(count: int, seed: int) -> NDArray[np.generic]:
    return np.random.default_rng(seed).permutation(_cifar_arrays()["train_balanced5k"])[:count]


_DECODED: dict[str, Labelled] = {}


def forget_decoded() -> None:
    """Drop the decoded pictures, which would count in a measurement of memory."""
    _DECODED.clear()


def _decoded(relative: str, limit: int) -> Labelled:
    """Return the first `limit` pictures of a zip as uint8 `(limit, 3, 224, 224)`, decoding each only once."""
    images, labels = _DECODED.get(relative, (torch.empty(0, 3, _NATIVE_SIZE, _NATIVE_SIZE), torch.empty(0)))
    if len(labels) < limit:
        planes: list[Tensor] = []
        with zipfile.ZipFile(data_file(relative)) as archive:
            rows = list(csv.DictReader(io.TextIOWrapper(archive.open("labels.csv"), encoding="utf-8")))[:limit]
            for row in rows:
                name = row["file"] if "/" in row["file"] else f"images/{row['file']}"
                with archive.open(name) as stream, Image.open(stream) as picture:
                    # The validation files are 227 wide; the networks were trained on the centre 224.
                    offset = (picture.width - _NATIVE_SIZE) // 2
                    box = (offset, offset, offset + _NATIVE_SIZE, offset + _NATIVE_SIZE)
                    pixels = np.array(picture.convert("RGB").crop(box))
                planes.append(torch.from_numpy(pixels).permute(2, 0, 1))
        images, labels = torch.stack(planes), torch.tensor([int(row["label"]) for row in rows])
        _DECODED[relative] = (images, labels)
    return images[:limit], labels[:limit]


def resized(images: Tensor, size: int) -> Tensor:
    """Return uint8 or float `(N, C, H, W)` as float32 `(N, C, size, size)`, antialiased bilinear if it differs."""
    pixels = images.float()
    if pixels.shape[-1] == size and pixels.shape[-2] == size:
        return pixels
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)


def imagenet_val(limit: int | None = None, size: int = _NATIVE_SIZE) -> Labelled:
    """Return the first `limit` of 1300 ILSVRC2012 validation images `(N, 3, size, size)`.

    The selection is easier than the full set: compare networks on it, never with published figures.

    Raises:
        FileFormatError: the data are missing.
    """
    images, labels = _decoded("imagenet_images/ilsvrc_val_1300.zip", min(limit or _VAL_IMAGES, _VAL_IMAGES))
    return resized(images, size), labels


def imagenet_calibration(count: int = 128, size: int = _NATIVE_SIZE, seed: int = 0) -> Tensor:
    """Return `count` of 1000 ILSVRC2012 train images, one per class, `(count, 3, size, size)`.

    Raises:
        FileFormatError: the data are missing.
    """
    images, _ = _calibration_drawn(count, seed)
    return resized(images, size)


def imagenet_calibration_labels(count: int = 128, seed: int = 0) -> Tensor:
    """Return the labels of these images, int64 `(count,)`, for methods that need them.

    Raises:
        FileFormatError: the data are missing.
    """
    return _calibration_drawn(count, seed)[1].long()


def _calibration_drawn(count: int, seed: int) -> Labelled:
    images, labels = _decoded("imagenet_images/ilsvrc_train_calib1000.zip", _CALIBRATION_IMAGES)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images))[:count])
    return images[order], labels[order]


def _undo_deltas(deltas: NDArray[np.generic]) -> Tensor:
    """Return uint8 RGB planes from row deltas, green stored relative to red and blue to green (modulo 256)."""
    planes = np.cumsum(deltas, axis=-1, dtype=np.uint8)
    planes[:, 1] += planes[:, 0]
    planes[:, 2] += planes[:, 1]
    return torch.from_numpy(planes)


@cache
def _mini_arrays() -> dict[str, NDArray[np.generic]]:
    return read_arrays("imagenet_images/imagenet_mini_224.npz")


def imagenet_mini(size: int = _NATIVE_SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Return 256 validation images, their labels and 64 train images for calibration; needs no JPEG decoder.

    Raises:
        FileFormatError: the data are missing.
    """
    arrays = _mini_arrays()
    images, calibration = (resized(_undo_deltas(arrays[key]), size) for key in ("eval_d", "calib_d"))
    return images, torch.from_numpy(arrays["eval_y"]).long(), calibration


def keyword_maps(split: Literal["all", "calibration", "evaluation"]) -> Labelled:
    """Return MFCC maps `(N, 1, 49, 10)`, already in the network's own units, and their keyword 0..11.

    "calibration" is a seeded 200 of the 1000 maps and "evaluation" the other 800, so that the two stay apart.

    Raises:
        FileFormatError: the data are missing.
        OptionError: `split` is unknown.
    """
    parts = {"all": slice(None), "calibration": slice(0, 200), "evaluation": slice(200, None)}
    if split not in parts:
        raise OptionError(f"unknown keyword split {split!r}; allowed: {', '.join(parts)}")
    arrays = read_arrays("mlperf_tiny/kws01_1000.npz")
    stored = torch.from_numpy(arrays["x_int8"]).float()
    maps = (stored - float(arrays["in_zero"])) * float(arrays["in_scale"])
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(maps)))[parts[split]]
    return maps[order].unsqueeze(1), torch.from_numpy(arrays["y"]).long()[order]


def set5(crop: int | None = None) -> list[tuple[str, Tensor, Tensor]]:
    """Return Set5 as (name, low resolution `(1, 3, H, W)`, high resolution `(1, 3, 2H, 2W)`), 0..255.

    `crop` cuts the centre square of that side out of each low-resolution image, for graphs of one fixed shape.

    Raises:
        FileFormatError: the data are missing.
    """
    arrays = read_arrays("superres/set5.npz")
    pairs = []
    for name in sorted(key.removeprefix("hr_") for key in arrays if key.startswith("hr_")):
        low, high = (
            torch.from_numpy(arrays[key]).permute(2, 0, 1).unsqueeze(0).float()
            for key in (f"lr_x2_{name}", f"hr_{name}")
        )
        if crop is not None:
            top, left = (low.shape[2] - crop) // 2, (low.shape[3] - crop) // 2
            low = low[:, :, top : top + crop, left : left + crop]
            high = high[:, :, 2 * top : 2 * (top + crop), 2 * left : 2 * (left + crop)]
        pairs.append((name, low, high))
    return pairs


@cache
def _crops() -> Tensor:
    arrays = read_arrays("superres/bsd_urban_dev.npz")
    pictures = pictures_of(arrays["png"], arrays["offset"])
    return torch.stack([picture.permute(2, 0, 1) for picture in pictures]).float()


def low_resolution() -> Tensor:
    """Return 24 low-resolution images `(24, 3, 96, 96)`, 0..255: crops of CBSD68 and Urban100, none of Set5's.

    Raises:
        FileFormatError: the data are missing.
    """
    return F.interpolate(_crops(), scale_factor=0.5, mode="bicubic", antialias=True).round().clamp(0.0, 255.0)


def bsd_urban() -> list[tuple[Tensor, Tensor]]:
    """Return the same images as (low resolution `(1, 3, 96, 96)`, high resolution `(1, 3, 192, 192)`), 0..255.

    Raises:
        FileFormatError: the data are missing.
    """
    low, high = low_resolution(), _crops()
    return [(low[k : k + 1], high[k : k + 1]) for k in range(len(low))]


def pictures_of(
    packed: NDArray[np.generic], ends: NDArray[np.generic], mode: Literal["RGB", "L"] = "RGB"
) -> list[Tensor]:
    """Return the pictures of JPEG or PNG files that lie behind each other, uint8: `(H, W, 3)`, or "L" `(H, W)`."""
    files, places = packed.tobytes(), ends.tolist()
    pictures = (Image.open(io.BytesIO(files[a:b])).convert(mode) for a, b in pairwise(places))
    return [torch.from_numpy(np.array(picture)) for picture in pictures]


def accuracy(
    model: Callable[[Tensor], Tensor] | nn.Module,
    images: Tensor,
    labels: Tensor,
    batch: int = 64,
    preprocessing: Preprocessing | None = None,
) -> float:
    """Return top-1 accuracy in percent of `model` over images `(N, C, H, W)`, `batch` at a time.

    `preprocessing` is applied per batch, so that raw images need not be held twice.
    """
    hits = 0
    with torch.inference_mode():
        for start in range(0, len(labels), batch):
            inputs = images[start : start + batch]
            logits = model(preprocessing(inputs) if preprocessing else inputs)
            hits += int((logits.argmax(1) == labels[start : start + batch]).sum())
    return 100.0 * hits / len(labels)
