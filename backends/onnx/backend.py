"""The target `onnxruntime`: a standard QDQ model, which ONNX Runtime runs on integer kernels.

Modules that need the ONNX packages are imported when they are used, so that fxquant works without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import GraphModule

from fxquant.backends.base import Backend, Executable, Export, Packages, Runtime
from fxquant.backends.exact import Requantization, Tracer, value_names
from fxquant.backends.kernel_rows import target_of
from fxquant.backends.onnx.export_options import OnnxOptions
from fxquant.backends.onnx.runtime_kernels import RUNTIME_KERNELS, runtime_formulas
from fxquant.backends.reference import STORAGE_BITS
from fxquant.core.run import leading_names

if TYPE_CHECKING:
    from fxquant.backends.onnx.export import ExportReport


PACKAGES = Packages(("onnx", "onnxruntime"), "fxquant[onnx]")


def check_packages() -> None:
    """Do nothing where the ONNX packages are installed.

    Raises:
        MissingDependencyError: one of them is missing.
    """
    PACKAGES.check("the onnxruntime target")


def write_onnx(
    module: GraphModule, path: Path, metadata: Mapping[str, str] | None = None, options: OnnxOptions | None = None
) -> ExportReport:
    """Write a simulated or float graph as ONNX; see `export_onnx`.

    Raises:
        MissingDependencyError: the ONNX packages are not installed.
        LoweringError: an op has no ONNX form.
        OptionError: `options.weight_only` names a layer that cannot have it.
        OutputError: the folder cannot be written.
    """
    check_packages()
    from fxquant.backends.onnx.export import export_onnx

    return export_onnx(module, path, metadata, options)


def write_routed(
    hard: GraphModule,
    easy: GraphModule,
    threshold: float,
    path: Path,
    metadata: Mapping[str, str] | None = None,
    options: OnnxOptions | None = None,
) -> ExportReport:
    """Write two simulated graphs and a router as one ONNX file; see `export_branches`.

    Raises:
        MissingDependencyError: the ONNX packages are not installed.
        LoweringError: an op has no ONNX form, or the graphs do not have one image as their input.
        OptionError: `options.weight_only` names a layer that cannot have it.
        OutputError: the folder cannot be written.
    """
    check_packages()
    from fxquant.backends.onnx.branches import export_branches

    return export_branches(hard, easy, threshold, path, metadata, options)


def _compile(module: GraphModule, inputs: tuple[Tensor, ...], threads: int | None = None) -> Executable:
    del inputs
    model = _model(module)
    from fxquant.backends.onnx.session import executable

    return executable(model, threads)


def _model(module: GraphModule, metadata: Mapping[str, str] | None = None) -> bytes:
    check_packages()
    from fxquant.backends.onnx.export import to_onnx

    data: bytes = to_onnx(module, metadata).SerializeToString()
    return data


def _file_bytes(module: GraphModule, metadata: Mapping[str, str]) -> int:
    return len(_model(module, metadata))


def _lower(module: GraphModule) -> GraphModule:
    check_packages()
    from fxquant.backends.onnx.session_graph import session_graph

    return session_graph(module)


def _write(module: GraphModule, path: Path, metadata: Mapping[str, str], **options: Any) -> int:
    return write_onnx(module, path, metadata, OnnxOptions(**options)).bytes


def _kernels(module: GraphModule, file: Path | None) -> dict[str, str]:
    check_packages()
    from fxquant.backends.onnx.session import kernel_report

    return dict(kernel_report(_model(module) if file is None else file).kernels)


def _trace(module: GraphModule, model: bytes | None, threads: int | None) -> Tracer:
    check_packages()
    from fxquant.backends.onnx.runtime_trace import onnx_tracer

    return onnx_tracer(model or _model(module), value_names(module), threads, leading_names(module.graph))


def _formulas(module: GraphModule) -> Requantization:
    del module
    return runtime_formulas()


def onnx_runtime() -> Backend:
    """Return what ONNX Runtime can do, its target by the rows of `RUNTIME_KERNELS`."""
    return Backend(
        target=target_of("onnxruntime", RUNTIME_KERNELS, (2, 3, 4, 5, 6, 7, 8), (8,), STORAGE_BITS),
        compile=_compile,
        lower=_lower,
        export=Export("model.onnx", _write, OnnxOptions, routes=True),
        file_bytes=_file_bytes,
        kernels=_kernels,
        runtimes={"onnxruntime": Runtime(_trace, _formulas)},
        packages=PACKAGES,
    )
