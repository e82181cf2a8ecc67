"""A lowered graph as Inductor's code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

COMPILING: dict[str, str | int | bool | Callable[..., Any]] = {
    # Layers are many and short: calling them from Python takes a tenth to a sixth of the time of a small network.
    "cpp_wrapper": True,
    # Nobody but us holds the modules of a lowered graph, so they need not be looked at before every call.
    "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
}
"""Options of torch.compile that suit lowered graphs."""


def compiled(lowered: GraphModule) -> Callable[..., Any]:
    """Return a lowered graph as Inductor's code; it is compiled at the first call, which takes a C++ compiler."""
    call: Callable[..., Any] = torch.compile(lowered, options=COMPILING)
    return call
