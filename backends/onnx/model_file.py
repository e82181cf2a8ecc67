"""Writes ONNX models to disk: one file, or a graph with its weights beside it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import TensorProto

from fxquant.backends.onnx.export_options import OnnxOptions
from fxquant.core.errors import LoweringError
from fxquant.core.storage import UNFINISHED, flush_to_disk, unwritable

ALIGNMENT = 4096
"""Offsets of external tensors: whole pages, so that a runtime may map the file."""
SMALLEST = 1024
"""Bytes from which on a tensor leaves the graph; what is smaller stays readable there."""


def write_model(model: onnx.ModelProto, path: Path, options: OnnxOptions, accept: Callable[[Path], None]) -> int:
    """Write and check a model; nothing is left behind on failure.

    Args:
        model: it loses its large tensors if they go to a file of their own, `<path>.data`.
        path: the file to write.
        options: says when weights go there.
        accept: raises an error where the file, weights beside it, must not be written.

    Returns:
        bytes of the file, or of both.

    Raises:
        LoweringError: the checker of onnx refuses the model.
        OutputError: the folder cannot be written.
    """
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{UNFINISHED}{path.name}.") as folder:
            staged, data = Path(folder) / path.name, Path(folder) / f"{path.name}.data"
            if options.external_data or weights > options.largest_file:
                _move_out(model, data)
            staged.write_bytes(model.SerializeToString())
            _check(staged)
            accept(staged)
            written = [file for file in (data, staged) if file.exists()]
            size = sum(file.stat().st_size for file in written)
            # The weights first: an old graph with new weights is the shorter of the two wrong moments.
            for file in written:
                flush_to_disk(file)
            for file in written:
                file.replace(path.with_name(file.name))
    except OSError as error:
        raise unwritable(path, error) from error
    return size


def _move_out(model: onnx.ModelProto, file: Path) -> None:
    """Write the large tensors of a model to a file, and leave only their places in the model."""
    with file.open("wb") as stream:
        for tensor in model.graph.initializer:
            data = tensor.raw_data
            if len(data) < SMALLEST:
                continue
            stream.write(bytes(-stream.tell() % ALIGNMENT))
            places = {"location": file.name, "offset": str(stream.tell()), "length": str(len(data))}
            stream.write(data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in places.items():
                tensor.external_data.add(key=key, value=value)


def _check(file: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LoweringError(f"the ONNX model is not valid: {error}") from error
