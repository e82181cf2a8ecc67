"""fxquant: a mixed-precision quantization compiler for PyTorch vision models."""

from fxquant.api import (
    allocate,
    calibrate,
    capture,
    convert,
    export_onnx,
    load,
    lower,
    measure_sensitivity,
    pareto,
    prepare,
    quantize,
    reconstruct,
    resolve,
)
from fxquant.core.errors import FxquantError
from fxquant.core.facts import BitAllocation, Budget, Settings
from fxquant.core.ir import Choice
from fxquant.core.run import CalibrationSet
from fxquant.result import Result

__version__ = "0.1.0"

__all__ = [
    "BitAllocation",
    "Budget",
    "CalibrationSet",
    "Choice",
    "FxquantError",
    "Result",
    "Settings",
    "allocate",
    "calibrate",
    "capture",
    "convert",
    "export_onnx",
    "load",
    "lower",
    "measure_sensitivity",
    "pareto",
    "prepare",
    "quantize",
    "reconstruct",
    "resolve",
]
