"""Traces recurrent layers by the shapes they return: torch computes every step of theirs, for seconds a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor
from torch._C import DispatchKey, _get_dispatch_mode, _TorchDispatchModeKey
from torch._decomp import decomposition_table
from torch._ops import OperatorBase
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.core.ir.ops import RECURRENT

Kernel = Callable[..., tuple[Tensor, ...]]
KEYS = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd, DispatchKey.Meta)
"""Where torch keeps the functions that compute them step by step."""


@contextmanager
def recurrent_shapes() -> Iterator[None]:
    """Let traced values go through recurrent layers without computing their steps; real ones are computed as ever.

    A trace that takes the layers apart on purpose, and records what computes a step, does so inside as well.
    """
    kernels = {op: {key: op.py_kernels[key] for key in KEYS if key in op.py_kernels} for op in RECURRENT}
    parts: dict[OperatorBase, Kernel] = {op: decomposition_table[op] for op in RECURRENT if op in decomposition_table}
    try:
        for op, known in kernels.items():
            op.py_kernels.update({key: _by_shape(compute) for key, compute in known.items()})
            op._dispatch_cache.clear()
        decomposition_table.update({op: _by_shape(compute) for op, compute in parts.items()})
        yield
    finally:
        decomposition_table.update(parts)
        for op, known in kernels.items():
            op.py_kernels.update(known)
            op._dispatch_cache.clear()


def _by_shape(compute: Kernel) -> Kernel:
    @wraps(compute)
    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        recorded = _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None
        if recorded or kwargs or not isinstance(args[0], FakeTensor):
            return compute(*args, **kwargs)
        return _shapes(args[0], args[1], bidirectional=args[-2], batch_first=args[-1])

    return run


def _shapes(x: Tensor, first: Tensor | Sequence[Tensor], bidirectional: bool, batch_first: bool) -> tuple[Tensor, ...]:
    states = [first] if isinstance(first, Tensor) else list(first)
    steps, images = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
    answer = x.new_empty((steps, images, states[0].shape[-1] * (1 + bidirectional)))
    return (answer.transpose(0, 1) if batch_first else answer, *(x.new_empty(state.shape) for state in states))
