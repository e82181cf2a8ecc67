"""The ONNX backend: QDQ files, run in ONNX Runtime or OpenVINO."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fxquant.backends.onnx.backend import check_packages, write_onnx, write_routed
from fxquant.backends.onnx.export_options import LARGEST_FILE, OnnxOptions
from fxquant.backends.onnx.runtime_kernels import RUNTIME_KERNELS, runtime_formulas

if TYPE_CHECKING:
    from fxquant.backends.onnx.blocks import block_linear, block_weights, to_blocks
    from fxquant.backends.onnx.builder import Array, GraphBuilder
    from fxquant.backends.onnx.contents import Inspection, Stored, inspect_onnx
    from fxquant.backends.onnx.export import ExportReport, export_onnx, to_onnx
    from fxquant.backends.onnx.model_file import ALIGNMENT, SMALLEST
    from fxquant.backends.onnx.openvino import add_biases
    from fxquant.backends.onnx.origins import Origins, type_name
    from fxquant.backends.onnx.packed_weights import PackedWeights
    from fxquant.backends.onnx.rewrites import fuse_integers, padded_conv
    from fxquant.backends.onnx.session import (
        KernelReport,
        all_nodes,
        executable,
        kernel_report,
        open_session,
        session_options,
        stray_conversions,
    )
    from fxquant.backends.onnx.shape_emitters import EMITTERS
    from fxquant.backends.onnx.stem import Axis, block_weight, fold_stems, space_to_depth

_LAZY = (
    *("blocks", "builder", "contents", "export", "model_file", "openvino"),
    *("origins", "packed_weights", "rewrites", "session", "shape_emitters", "stem"),
)
"""Modules that need the ONNX packages: imported when one of their names is first asked for."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_packages()
    modules = (importlib.import_module(f"{__name__}.{module}") for module in _LAZY)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


__all__ = [
    "ALIGNMENT",
    "EMITTERS",
    "LARGEST_FILE",
    "RUNTIME_KERNELS",
    "SMALLEST",
    "Array",
    "Axis",
    "ExportReport",
    "GraphBuilder",
    "Inspection",
    "KernelReport",
    "OnnxOptions",
    "Origins",
    "PackedWeights",
    "Stored",
    "add_biases",
    "all_nodes",
    "block_linear",
    "block_weight",
    "block_weights",
    "executable",
    "export_onnx",
    "fold_stems",
    "fuse_integers",
    "inspect_onnx",
    "kernel_report",
    "open_session",
    "padded_conv",
    "runtime_formulas",
    "session_options",
    "space_to_depth",
    "stray_conversions",
    "to_blocks",
    "to_onnx",
    "type_name",
    "write_onnx",
    "write_routed",
]
