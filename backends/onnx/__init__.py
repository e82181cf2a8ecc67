"""The ONNX backend: QDQ files, run in ONNX Runtime or OpenVINO."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxquant.backends.onnx.backend import OnnxRuntimeBackend, onnx_module, write_onnx
    from fxquant.backends.onnx.blocks import block_linear, block_weights, to_blocks
    from fxquant.backends.onnx.builder import Array, pack
    from fxquant.backends.onnx.contents import Inspection, Stored, inspect_onnx
    from fxquant.backends.onnx.export import ExportReport, export_onnx, to_onnx
    from fxquant.backends.onnx.export_options import BLOCK_SIZES, LARGEST_FILE, RUNTIMES, OnnxOptions
    from fxquant.backends.onnx.model_file import ALIGNMENT, SMALLEST
    from fxquant.backends.onnx.openvino import add_biases, readable_storage
    from fxquant.backends.onnx.origins import Origins, type_name
    from fxquant.backends.onnx.rewrites import padded_conv, prepare
    from fxquant.backends.onnx.runtime_kernels import RUNTIME_KERNELS
    from fxquant.backends.onnx.session import (
        KernelReport,
        executable,
        kernel_report,
        open_session,
        session_options,
        stray_conversions,
    )
    from fxquant.backends.onnx.stem import Axis, block_weight, fold_stems, space_to_depth

_MODULES = {
    "RUNTIME_KERNELS": "runtime_kernels",
    "OnnxRuntimeBackend": "backend",
    "onnx_module": "backend",
    "write_onnx": "backend",
    "block_linear": "blocks",
    "block_weights": "blocks",
    "to_blocks": "blocks",
    "Array": "builder",
    "pack": "builder",
    "Inspection": "contents",
    "Stored": "contents",
    "inspect_onnx": "contents",
    "ExportReport": "export",
    "export_onnx": "export",
    "to_onnx": "export",
    "BLOCK_SIZES": "export_options",
    "LARGEST_FILE": "export_options",
    "OnnxOptions": "export_options",
    "RUNTIMES": "export_options",
    "ALIGNMENT": "model_file",
    "SMALLEST": "model_file",
    "add_biases": "openvino",
    "readable_storage": "openvino",
    "Origins": "origins",
    "type_name": "origins",
    "padded_conv": "rewrites",
    "prepare": "rewrites",
    "KernelReport": "session",
    "executable": "session",
    "kernel_report": "session",
    "open_session": "session",
    "session_options": "session",
    "stray_conversions": "session",
    "Axis": "stem",
    "block_weight": "stem",
    "fold_stems": "stem",
    "space_to_depth": "stem",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


__all__ = [
    "ALIGNMENT",
    "BLOCK_SIZES",
    "LARGEST_FILE",
    "RUNTIMES",
    "RUNTIME_KERNELS",
    "SMALLEST",
    "Array",
    "Axis",
    "ExportReport",
    "Inspection",
    "KernelReport",
    "OnnxOptions",
    "OnnxRuntimeBackend",
    "Origins",
    "Stored",
    "add_biases",
    "block_linear",
    "block_weight",
    "block_weights",
    "executable",
    "export_onnx",
    "fold_stems",
    "inspect_onnx",
    "kernel_report",
    "onnx_module",
    "open_session",
    "pack",
    "padded_conv",
    "prepare",
    "readable_storage",
    "session_options",
    "space_to_depth",
    "stray_conversions",
    "to_blocks",
    "to_onnx",
    "type_name",
    "write_onnx",
]
