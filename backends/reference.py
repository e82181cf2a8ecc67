"""The reference backends: the explicit integer graph computed in float, the oracle every backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.backends.base import Backend, Executable
from fxquant.backends.explicit_graph import to_qdq
from fxquant.backends.kernel_rows import KernelRow, target_of
from fxquant.core.facts import Target
from fxquant.core.ir import OPS, ScaleRule
from fxquant.core.run import first_tensor

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
STORAGE_BITS = dict(zip(WIDTHS, WIDTHS, strict=True))


def _rows(refuse_products: str = "") -> dict[str, KernelRow]:
    """Return a row for every kind of op that computes: float arithmetic on grid values needs no kernel."""
    return {
        rule.kind: KernelRow(
            "float arithmetic on grid values", refuse_products if rule.macs is not None and rule.weight is None else ""
        )
        for rule in OPS.values()
        # A function of single values would only be rounded once more: that of some runtimes is for their own tables.
        if rule.scale is ScaleRule.OWN and not rule.pointwise
    }


def _compile(module: GraphModule, inputs: tuple[Tensor, ...], threads: int | None = None) -> Executable:
    """Make a graph run in float32; the number of threads is a setting of the process, so `threads` is not used."""
    del inputs, threads
    qdq = to_qdq(module)

    def run(tensors: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            return first_tensor(qdq(*tensors)).float()

    return run


def reference() -> Backend:
    """Return what computes every op of the op table that has its own grid, except products of two activations."""
    rows = _rows("runtimes compute products of two activations at float speed")
    return _in_float(target_of("reference", rows, WIDTHS, WIDTHS, STORAGE_BITS))


def simulation() -> Backend:
    """Return the same with products of two activations on grids, which no runtime here computes faster than float."""
    return _in_float(target_of("simulation", _rows(), WIDTHS, WIDTHS, STORAGE_BITS))


def _in_float(target: Target) -> Backend:
    return Backend(target=target, compile=_compile, lower=to_qdq)
