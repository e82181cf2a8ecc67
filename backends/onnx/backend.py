"""The ONNX Runtime backend: simulated graph in, standard QDQ model out, running on integer kernels."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx import GraphModule

from fxquant.backends.base import Executable
from fxquant.backends.kernel_rows import target_of
from fxquant.backends.onnx.export_options import OnnxOptions
from fxquant.backends.onnx.runtime_kernels import RUNTIME_KERNELS
from fxquant.backends.reference import STORAGE_BITS
from fxquant.core.errors import MissingDependencyError
from fxquant.core.facts import Target

if TYPE_CHECKING:
    from fxquant.backends.onnx.export import ExportReport


def onnx_module(name: str) -> ModuleType:
    """Import a module of this package that needs the ONNX packages.

    Raises:
        MissingDependencyError: they are not installed.
    """
    try:
        return importlib.import_module(f"fxquant.backends.onnx.{name}")
    except ImportError as error:
        if error.name is not None and error.name.startswith("fxquant"):
            raise
        raise MissingDependencyError(
            f'the onnxruntime target needs {error.name}, which is not installed; pip install "fxquant[onnx]"'
        ) from error


def write_onnx(
    module: GraphModule, path: Path, metadata: Mapping[str, str] | None = None, options: OnnxOptions | None = None
) -> ExportReport:
    """Write a simulated or float graph as ONNX; see `onnx_export.export_onnx`.

    Raises:
        MissingDependencyError: the ONNX packages are not installed.
        LoweringError: an op has no ONNX form.
        OptionError: `options.weight_only` names a layer that cannot have it.
        OutputError: the folder cannot be written.
    """
    report: ExportReport = onnx_module("export").export_onnx(module, path, metadata, options)
    return report


class OnnxRuntimeBackend:
    """Runs graphs in ONNX Runtime on the CPU."""

    @property
    def target(self) -> Target:
        """What the rows of `RUNTIME_KERNELS` run on integers."""
        return target_of("onnxruntime", RUNTIME_KERNELS, (2, 3, 4, 5, 6, 7, 8), (8,), STORAGE_BITS)

    def compile(self, module: GraphModule, inputs: tuple[Tensor, ...], threads: int | None = None) -> Executable:
        """Make a graph run; see `Backend.compile`."""
        del inputs
        model = onnx_module("export").to_onnx(module)
        run: Executable = onnx_module("session").executable(model.SerializeToString(), threads)
        return run
