"""Calibration data: collects any iterable of batches into one set of tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fxquant.core.errors import CalibrationError, FileFormatError, first_line
from fxquant.core.ir import differentiable
from fxquant.core.storage import read_tensors, write_tensors

DATASET_BATCH = 32
LARGEST = 2 * 10**9
"""Most bytes of images that are collected from a loader."""

WRAP = (
    "; fxquant gives tensors by position: where forward takes a list, a dictionary, *inputs or keywords, wrap the "
    "model in a module with `def forward(self, image): return self.model({'image': image})`"
)
"""Advice for a model that does not take its tensors one by one."""

log = logging.getLogger(__name__)

CHECKED = 32
"""Images whose values are checked at once."""


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Images for calibration, all inputs of equal length along axis 0.

    Args:
        inputs: one tensor per model input, each of shape (images, ...).
        labels: shape (images,), or None.

    Raises:
        CalibrationError: no images, inputs of different length, or values that are not finite.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(differentiable(tensor) for tensor in self.inputs))
        if any(tensor.dim() == 0 for tensor in self.inputs):
            raise CalibrationError("a calibration input is a single number; give images with a batch axis in front")
        if not self.inputs or self.inputs[0].shape[0] == 0:
            raise CalibrationError("calibration holds no images; give at least one batch")
        lengths = {int(t.shape[0]) for t in self.inputs}
        if len(lengths) != 1 or (self.labels is not None and int(self.labels.shape[0]) not in lengths):
            raise CalibrationError(f"calibration inputs and labels differ in length: {sorted(lengths)}")
        for position, tensor in enumerate(self.inputs):
            # A few images at a time: the check copies what it looks at.
            for start in range(0, len(tensor) if tensor.is_floating_point() else 0, CHECKED):
                finite = torch.isfinite(tensor[start : start + CHECKED])
                if not finite.all():
                    bad = start + int((~finite).reshape(len(finite), -1).any(dim=1).nonzero()[0])
                    raise CalibrationError(
                        f"calibration input {position} holds NaN or infinity, first in image {bad}; remove or repair it"
                    )

    def __len__(self) -> int:
        return int(self.inputs[0].shape[0])

    def batches(self, size: int) -> Iterator[CalibrationSet]:
        """Yield the set in batches of `size`, the last one possibly smaller."""
        for start in range(0, len(self), size):
            yield self.slice(start, start + size)

    def slice(self, start: int, stop: int) -> CalibrationSet:
        """Return images start..stop-1."""
        labels = None if self.labels is None else self.labels[start:stop]
        return CalibrationSet(tuple(t[start:stop] for t in self.inputs), labels)

    def take(self, index: Sequence[int]) -> CalibrationSet:
        """Return the images at these positions."""
        rows = torch.as_tensor(list(index), dtype=torch.long)
        return CalibrationSet(tuple(t[rows] for t in self.inputs), None if self.labels is None else self.labels[rows])

    def joined(self, other: CalibrationSet) -> CalibrationSet:
        """Return these images and the others behind them; without labels where one part has none."""
        inputs = tuple(torch.cat(pair) for pair in zip(self.inputs, other.inputs, strict=True))
        labels = [part.labels for part in (self, other) if part.labels is not None]
        return CalibrationSet(inputs, torch.cat(labels) if len(labels) == 2 else None)

    @property
    def bytes(self) -> int:
        """Bytes of the inputs."""
        return sum(tensor.nbytes for tensor in self.inputs)

    def save(self, path: Path) -> None:
        """Write what `load` reads, as safetensors.

        Raises:
            OutputError: the path cannot be written.
        """
        labels = {} if self.labels is None else {"labels": self.labels}
        write_tensors(path, {f"input_{k}": tensor for k, tensor in enumerate(self.inputs)} | labels)

    @staticmethod
    def load(path: Path) -> CalibrationSet:
        """Read what `save` wrote.

        Raises:
            FileFormatError: missing or damaged.
        """
        tensors = read_tensors(path)
        try:
            inputs = tuple(tensors[f"input_{k}"] for k in range(sum(name.startswith("input_") for name in tensors)))
            return CalibrationSet(inputs, tensors.get("labels"))
        except (KeyError, CalibrationError) as error:
            raise FileFormatError(f"{path} does not hold the held-out images ({error}); quantize again") from error

    def split(self, held_out: float, seed: int) -> tuple[CalibrationSet, CalibrationSet]:
        """Return (scoring, held-out) parts in a seeded order; with one image both are that image."""
        if len(self) == 1:
            return self, self
        count = min(max(1, round(held_out * len(self))), len(self) - 1)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return self.take(sorted(order[count:])), self.take(sorted(order[:count]))


FAULTS: tuple[tuple[Callable[[Tensor], bool], str], ...] = (
    (lambda t: t.is_meta, "has no values (device meta); give images, not their shapes"),
    (lambda t: t.is_nested, "is nested; resize the images to one size and stack them"),
    (lambda t: t.is_quantized, "is quantized; give .dequantize()"),
    (lambda t: t.layout != torch.strided, "is stored sparsely; give .to_dense()"),
)
"""Test for a kind of tensor that cannot be used, what the error message says of it."""


def _tensor(value: object) -> Tensor:
    if isinstance(value, Tensor):
        for has_fault, message in FAULTS:
            if has_fault(value):
                raise CalibrationError(f"a calibration tensor {message}")
        try:
            _ = torch.empty(0, dtype=value.dtype).numpy()
        except TypeError as error:
            # Runtimes take their inputs as NumPy arrays.
            kind = str(value.dtype).removeprefix("torch.")
            raise CalibrationError(
                f"calibration images are {kind}, which no runtime supports; give them as float32, with .float()"
            ) from error
        return value.detach()
    if isinstance(value, np.ndarray | np.generic | int | float):
        try:
            # Copied: torch cannot share reversed arrays, and warns about read-only ones.
            return torch.as_tensor(np.array(value, order="C"))
        except TypeError as error:
            raise CalibrationError(f"calibration batch holds an array that is not numeric ({error})") from error
    nested = WRAP if isinstance(value, Mapping | list | tuple) else ""
    raise CalibrationError(f"calibration batch holds a {type(value).__name__}; give tensors or numpy arrays{nested}")


def _label(value: object) -> Tensor | None:
    """Return class numbers as a tensor, None for other kinds of labels."""
    try:
        return _tensor(np.asarray(value) if isinstance(value, list | tuple) else value)
    except (CalibrationError, ValueError, TypeError):
        return None


def collect(calibration: object, names: Sequence[str], limit: int | None = None) -> CalibrationSet:
    """Collect any iterable of batches into one set.

    Args:
        calibration: iterable of Tensor | tuple | list | dict batches, a torch Dataset of single images, or one tensor
            or array of images. The first `len(names)` members of a tuple are inputs, one more is labels; a dict is read
            by input name.
        names: the model's input names, in order.
        limit: stop after this many images. Reading also stops, with a warning in the log, before several batches take
            more than `LARGEST` bytes.

    Raises:
        CalibrationError: empty, too few inputs in a batch, a missing name, ragged or non-finite tensors.
    """
    if isinstance(calibration, CalibrationSet):
        return calibration if limit is None else calibration.slice(0, limit)
    if isinstance(calibration, Tensor | np.ndarray):
        calibration = [calibration]
    if isinstance(calibration, Dataset) and not isinstance(calibration, IterableDataset):
        calibration = _batched(calibration)
    if isinstance(calibration, Mapping) or not isinstance(calibration, Iterable):
        raise CalibrationError(f"calibration is a {type(calibration).__name__}; give an iterable of batches")
    columns: list[list[Tensor]] = [[] for _ in names]
    labels: list[Tensor] = []
    seen, held = 0, 0
    for batch in calibration:
        inputs, label = _unpack(batch, names)
        held += sum(tensor.nbytes for tensor in inputs)
        if held > LARGEST and seen:
            # A loader may be endless, or larger than memory: the rest is not even read.
            log.warning(
                "calibration uses only the first %d images: at most %.1f GB are kept; smaller images allow more",
                seen,
                LARGEST / 1e9,
            )
            break
        for column, tensor in zip(columns, inputs, strict=True):
            if tensor.dim() == 0:
                raise CalibrationError("a calibration batch is a single number; give images with a batch axis in front")
            column.append(tensor)
        if label is not None:
            labels.append(label)
        seen += int(inputs[0].shape[0])
        if limit is not None and seen >= limit:
            break
    if seen == 0:
        raise CalibrationError("calibration holds no images; give at least one batch")
    try:
        joined = tuple(torch.cat(column)[:limit] for column in columns)
    except (RuntimeError, TypeError) as error:
        shapes = sorted({tuple(t.shape[1:]) for column in columns for t in column})
        raise CalibrationError(
            f"calibration batches do not fit together, image shapes {shapes}; resize to one"
        ) from error
    # Labels are class numbers, one for each image; other things that a loader returns are ignored.
    target = torch.cat(labels)[:limit] if labels and all(label.dim() == 1 for label in labels) else None
    keep = target is not None and target.shape[0] == joined[0].shape[0]
    return CalibrationSet(joined, target if keep else None)


def _batched(dataset: Dataset[object]) -> Iterator[object]:
    """Yield a dataset's samples in batches.

    Raises:
        CalibrationError: samples that are not tensors or arrays, or not of one shape.
    """
    try:
        yield from DataLoader(dataset, batch_size=DATASET_BATCH)
    except (TypeError, RuntimeError) as error:
        raise CalibrationError(
            f"the dataset's samples cannot be batched ({first_line(error)}); "
            "give it a transform that returns tensors of one size"
        ) from error


def _is_list_of_images(members: list[object]) -> bool:
    """Whether a batch holds images one by one; a few such tensors may also be an input and its company."""
    shapes = [each.shape for each in members if isinstance(each, Tensor)]
    return len(shapes) == len(members) > 3 and all(len(shape) == 3 and shape[0] in (1, 3) for shape in shapes)


def _unpack(batch: object, names: Sequence[str]) -> tuple[list[Tensor], Tensor | None]:
    if isinstance(batch, Mapping):
        missing = [name for name in names if name not in batch]
        if missing:
            nested = WRAP if len(names) == 1 else ""
            raise CalibrationError(
                f"calibration batch lacks inputs {missing}; it has {sorted(map(str, batch))}{nested}"
            )
        label = next((batch[key] for key in ("labels", "label", "y") if key in batch and key not in names), None)
        return [_tensor(batch[name]) for name in names], None if label is None else _label(label)
    members = list(batch) if isinstance(batch, list | tuple) else [batch]
    if len(members) < len(names):
        raise CalibrationError(
            f"calibration batch has {len(members)} members, the model has {len(names)} inputs {list(names)}"
        )
    inputs = [_tensor(member) for member in members[: len(names)]]
    if len(names) == 1 and _is_list_of_images(members):
        raise CalibrationError(
            f"a calibration batch is a list of {len(members)} images {tuple(inputs[0].shape)}; give one tensor, "
            "torch.stack(batch); where forward takes a list, quantize what it calls with a batch: fxquant.part(model, "
            '"backbone", images)'
        )
    return inputs, _label(members[len(names)]) if len(members) == len(names) + 1 else None
