"""The files that the contestants of `benchmarks.peers` load: one float model, quantized by us and by the peers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from benchmarks.contestants import CALIBRATION_IMAGES, images, model
from fxquant import flow
from fxquant.api import capture, prepare
from fxquant.backends.onnx import OnnxOptions, export_onnx
from fxquant.core.facts import Settings
from fxquant.core.run import CalibrationSet
from fxquant.passes import simulate, widest_plan

OURS = ("float.onnx", "fxquant.onnx", "fxquant_openvino.onnx")

TRANSFORMERS = ("deit_tiny",)

STATIC: dict[str, dict[str, bool]] = {"static.onnx": {}, "static_constant.onnx": {"MatMulConstBOnly": True}}
"""File -> extra options of quantize_static; the second leaves products of two activations in float."""


class Images:
    """Hands images to quantize_static one at a time."""

    def __init__(self, name: str, batch: Tensor) -> None:
        self._feeds: Iterator[dict[str, np.ndarray[Any, Any]]] = iter(
            [{name: batch[k : k + 1].numpy()} for k in range(len(batch))]
        )

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """Return the next image, None at the end."""
        return next(self._feeds, None)


def write_files(network: str, folder: Path) -> list[str]:
    """Write what is missing of a network's files, and return which peers could not write theirs and why."""
    folder.mkdir(parents=True, exist_ok=True)
    if not all((folder / file).is_file() for file in OURS):
        _write_ours(network, folder)
    absent = []
    for file, make in {**dict.fromkeys(STATIC, _static), "nncf.xml": _nncf}.items():
        if (folder / file).is_file():
            continue
        try:
            make(network, folder, file)
        except ImportError as error:
            absent.append(f"{file} of {network}: {error}")
    return absent


def _write_ours(network: str, folder: Path) -> None:
    calibration = CalibrationSet((images(network, CALIBRATION_IMAGES),))
    program = prepare(capture(model(network), calibration), Settings(bits=(8,), target="onnxruntime"))
    program = flow.calibrate(program, calibration)
    export_onnx(program.module, folder / "float.onnx")
    simulated = simulate(program, widest_plan(program)).module
    export_onnx(simulated, folder / "fxquant.onnx")
    export_onnx(simulated, folder / "fxquant_openvino.onnx", options=OnnxOptions(runtime="openvino"))


def _static(network: str, folder: Path, file: str) -> None:
    prepared = folder / "preprocessed.onnx"
    logging.getLogger().setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quant_pre_process(str(folder / "float.onnx"), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(folder / file),
            Images(onnx.load(prepared).graph.input[0].name, images(network, CALIBRATION_IMAGES)),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options=STATIC[file],
        )


def _nncf(network: str, folder: Path, file: str) -> None:
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    kind = nncf.ModelType.TRANSFORMER if network in TRANSFORMERS else None
    calibration = images(network, CALIBRATION_IMAGES)
    dataset = nncf.Dataset([calibration[k : k + 1].numpy() for k in range(len(calibration))])
    quantized = nncf.quantize(
        openvino.Core().read_model(str(folder / "float.onnx")), dataset, model_type=kind, subset_size=len(calibration)
    )
    openvino.save_model(quantized, str(folder / file))
