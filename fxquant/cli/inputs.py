"""Loads what the command line names: models, calibration files, folders of images, `pkg.module:name`, `net.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxquant.core.errors import CalibrationError, FileFormatError, FxquantError, MissingDependencyError, OptionError
from fxquant.core.facts import Options, rules
from fxquant.core.run import LossFunction
from fxquant.core.storage import load_exported, read_array, read_arrays

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that Pillow may use, whatever the suffix: it would run another program on PostScript."""
WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
"""Suffixes of files that hold weights, or a model that only its own classes can be read with."""
LABELS = ("labels", "label", "y")
BATCH = 32


@dataclass(frozen=True)
class ImageOptions(Options):
    """How image files become tensors: scaled to cover `size`, cut out of the middle, then `(value - mean) / std`.

    Args:
        size: height and width to which the images of a folder are brought.
        mean: subtracted from values 0..1, one number per channel; one number reads images as grey.
        std: values are divided by it, one number per channel.

    Raises:
        OptionError: a size below 1, or mean and std that do not fit.
    """

    size: tuple[int, int] | None = field(default=None, metadata=rules(least=1, flag="image_size"))
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = field(default=(1.0, 1.0, 1.0), metadata=rules(above=0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise OptionError(f"--mean {self.mean} and --std {self.std} need one number each for 1 or 3 channels")


def load_model(spec: str) -> nn.Module | ExportedProgram:
    """Return the model of `pkg.module:factory`, `net.py:factory` or of a `.pt2` file.

    Raises:
        OptionError: there is no such object, calling it fails, or it is no model.
        FileFormatError: the `.pt2` file is missing or damaged.
    """
    if spec.endswith(".pt2"):
        return load_exported(Path(spec))
    if spec.endswith(WEIGHTS):
        raise OptionError(
            f"--model {spec}: weights alone are no model, and a whole pickled model is not read, since reading it "
            "may run any program; write a function that builds the model and loads its weights, "
            f"`model.load_state_dict(torch.load({Path(spec).name!r}, weights_only=True))`, and give net.py:function; "
            "or save the model with torch.export.save as .pt2"
        )
    found = _object(spec, "--model")
    if callable(found) and not isinstance(found, nn.Module):
        found = _called(found, spec)
    if not isinstance(found, nn.Module | ExportedProgram):
        raise OptionError(f"--model {spec} gives a {type(found).__name__}, not a torch.nn.Module or ExportedProgram")
    return found


def load_loss(spec: str | None) -> LossFunction | str | None:
    """Return the function of `pkg.module:function` or `net.py:function`; names of losses as they are.

    Raises:
        OptionError: there is no such function.
    """
    if spec is None or ":" not in spec:
        return spec
    found = _object(spec, "--loss")
    if not callable(found):
        raise OptionError(f"--loss {spec} gives a {type(found).__name__}, not a function")
    return cast(LossFunction, found)


def load_calibration(spec: str, options: ImageOptions, limit: int | None, option: str = "--calibration") -> object:
    """Return an iterable of batches.

    Args:
        spec: `.npz`, `.npy`, a folder of images, or `pkg.module:loader`.
        options: how images of a folder are read.
        limit: images wanted, None for all; a larger folder is sampled evenly in sorted order.
        option: what the spec was given with, for messages.

    Raises:
        CalibrationError: a file cannot be read, or the folder holds no images.
        OptionError: the spec is not understood, or an option is missing.
        FileFormatError: the npz is damaged or holds pickled objects.
    """
    path = Path(spec)
    if path.suffix == ".npz":
        return _from_npz(path)
    if path.suffix == ".npy":
        return [_floats(_read_npy(path))]
    if path.is_dir():
        return _from_folder(path, options, limit, option)
    if ":" not in spec:
        raise OptionError(
            f"{option} {spec} is neither .npz, .npy, an existing folder of images, pkg.module:loader nor net.py:loader"
        )
    found = _object(spec, option)
    if callable(found) and not hasattr(found, "__iter__"):
        found = _called(found, spec)
    return found if isinstance(found, Tensor | np.ndarray | Mapping) else _guarded(found, spec)


def _object(spec: str, option: str) -> object:
    """Return what `pkg.module:name` or `path/file.py:name` names, modules of the current folder included."""
    place, separator, name = spec.rpartition(":")
    if not separator or not place or not name:
        raise OptionError(
            f"{option} {spec} is not understood; write pkg.module:name, net.py:name or the path of a file"
        )
    file = Path(place) if place.endswith(".py") else None
    if file is not None and not file.is_file():
        raise OptionError(f"{option} {spec}: there is no file {file}")
    # What a file imports from beside it is found, too.
    folder = str(Path.cwd() if file is None else file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: object = importlib.import_module(place) if file is None else _module_of(file)
    except Exception as error:
        # A user's module may raise anything while it is imported.
        raise OptionError(f"{option} {spec}: importing {place} failed: {_line(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            owner = found.__name__ if isinstance(found, ModuleType) else type(found).__name__
            raise OptionError(f"{option} {spec}: {owner} has no {part!r}")
        found = getattr(found, part)
    return found


def _module_of(file: Path) -> ModuleType:
    """Import a file, under a name that no other module has."""
    name = file.stem
    while name in sys.modules:
        name = f"{name}_"
    known = importlib.util.spec_from_file_location(name, file)
    assert known is not None
    assert known.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(known)
    known.loader.exec_module(module)
    return module


def _called(factory: Callable[..., object], spec: str) -> object:
    try:
        return factory()
    except FxquantError:
        raise
    except Exception as error:
        raise OptionError(f"calling {spec} failed: {_line(error)}") from error


def _guarded(batches: Any, spec: str) -> Iterator[object]:
    """Yield from a user's loader and say whose failure it was."""
    try:
        yield from batches
    except FxquantError:
        raise
    except Exception as error:
        raise CalibrationError(f"reading calibration images from {spec} failed: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _floats(array: NDArray[Any]) -> NDArray[Any]:
    # NumPy's own default is float64, which no network here takes.
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _read_npy(path: Path) -> NDArray[Any]:
    if path.is_file() and zipfile.is_zipfile(path):
        raise CalibrationError(f"{path} is an archive, not one array; call it .npz")
    try:
        return read_array(path)
    except FileFormatError as error:
        raise CalibrationError(f"{path} is not a readable npy file of plain numbers ({error})") from error


def _from_npz(path: Path) -> object:
    arrays = {name: _floats(array) for name, array in read_arrays(path).items()}
    inputs = [name for name in arrays if name not in LABELS]
    if not inputs:
        raise CalibrationError(f"{path} holds no arrays but labels; save the images under their input's name")
    if len(inputs) > 1:
        return [arrays]
    label = next((arrays[name] for name in LABELS if name in arrays), None)
    return [arrays[inputs[0]] if label is None else (arrays[inputs[0]], label)]


def _from_folder(folder: Path, options: ImageOptions, limit: int | None, option: str) -> Iterator[Tensor]:
    if options.size is None:
        raise OptionError(f"{option} {folder} is a folder of images; say --image-size, for example 224")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not found:
        raise CalibrationError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    # Folders are often sorted by class: every n-th file, not the first ones.
    count = len(found) if limit is None else min(limit, len(found))
    picked = [found[k * len(found) // count] for k in range(count)]
    return _batches(picked, options, options.size)


def _batches(paths: list[Path], options: ImageOptions, size: tuple[int, int]) -> Iterator[Tensor]:
    for start in range(0, len(paths), BATCH):
        yield torch.stack([read_image(path, options, size) for path in paths[start : start + BATCH]])


def read_image(path: Path, options: ImageOptions, size: tuple[int, int]) -> Tensor:
    """Return one image, float32 of shape (channels, height, width).

    Raises:
        CalibrationError: the file is no image that Pillow reads; the message names it.
        MissingDependencyError: Pillow is not installed.
    """
    try:
        # Imported here because only folders of images need it.
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingDependencyError(
            'a folder of images is read with Pillow, which is not installed; pip install "fxquant[vision]"'
        ) from error
    try:
        with Image.open(path, formats=FORMATS) as opened:
            upright = ImageOps.exif_transpose(opened).convert("L" if len(options.mean) == 1 else "RGB")
            fitted = ImageOps.fit(upright, (size[1], size[0]), Image.Resampling.BILINEAR)
    except Exception as error:
        # Decoders of damaged images fail with errors of a dozen kinds.
        raise CalibrationError(f"image {path} cannot be read ({_line(error)}); repair or remove it") from error
    pixels = torch.from_numpy(np.array(fitted, dtype=np.float32) / 255.0).reshape(*size, len(options.mean))
    normalised = (pixels - torch.tensor(options.mean)) / torch.tensor(options.std)
    return normalised.permute(2, 0, 1).contiguous()
