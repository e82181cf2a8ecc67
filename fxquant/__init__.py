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
from fxquant.backends.onnx import OnnxOptions
from fxquant.core.errors import FxquantError
from fxquant.core.facts import BitAllocation, Budget, Settings, Target
from fxquant.core.ir import Choice
from fxquant.core.run import CalibrationSet
from fxquant.parity import check
from fxquant.parts import part
from fxquant.result import Result

__version__ = "0.1.0"

__all__ = [
    "BitAllocation",
    "Budget",
    "CalibrationSet",
    "Choice",
    "FxquantError",
    "OnnxOptions",
    "Result",
    "Settings",
    "Target",
    "allocate",
    "calibrate",
    "capture",
    "check",
    "convert",
    "export_onnx",
    "load",
    "lower",
    "measure_sensitivity",
    "pareto",
    "part",
    "prepare",
    "quantize",
    "reconstruct",
    "resolve",
]
