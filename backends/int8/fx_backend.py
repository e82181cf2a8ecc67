"""The target `fx_int8`: PyTorch's own integer kernels, as a graph that runs eagerly or through Inductor."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch.fx import GraphModule

from fxquant.backends.base import Backend, Runtime
from fxquant.backends.exact import BATCH, Requantization, Tracer, layer_name
from fxquant.backends.int8.backend import NAME, FxInt8Backend, kernel_report, traced_forms
from fxquant.backends.int8.lowered_trace import lowered_tracer
from fxquant.backends.int8.rules import compiled_formulas, eager_formulas

_EAGERLY = FxInt8Backend()


def _kernels(module: GraphModule, file: Path | None) -> dict[str, str]:
    del file
    ran, found = kernel_report(_EAGERLY.lower(module)), dict[str, str]()
    for node in module.graph.nodes:
        layer = layer_name(node)
        if layer is not None and node.name in ran:
            found.setdefault(layer, ran[node.name])
    return found


def _trace(module: GraphModule, model: bytes | None, threads: int | None, inductor: bool = False) -> Tracer:
    del model, threads
    return lowered_tracer(module, _EAGERLY.lower(module, BATCH), inductor=inductor)


def _formulas(module: GraphModule) -> Requantization:
    del module
    return eager_formulas()


def _formulas_compiled(module: GraphModule) -> Requantization:
    return compiled_formulas(traced_forms(_EAGERLY.lower(module, BATCH)))


def fx_int8() -> Backend:
    """Return what PyTorch's kernels can do."""
    return Backend(
        target=_EAGERLY.target,
        compile=_EAGERLY.compile,
        lower=_EAGERLY.lower,
        kernels=_kernels,
        runtimes={
            NAME: Runtime(_trace, _formulas),
            "compiled": Runtime(partial(_trace, inductor=True), _formulas_compiled),
        },
    )
