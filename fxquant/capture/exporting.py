"""torch.export, without what it prints, and its errors in one line."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxquant.core.errors import first_line
from fxquant.core.ir import recurrent_shapes


def traced(model: nn.Module, inputs: tuple[Tensor, ...], shapes: tuple[Any, ...], strict: bool) -> ExportedProgram:
    """Export a model.

    Args:
        model: in eval mode.
        inputs: one tensor per input, two images at least.
        shapes: free axes in the form of the forward's parameters.
        strict: read the bytecode instead of running the model.
    """
    # Where export fails, torch prints the graph so far; what a user can act on is in the error.
    with torch.no_grad(), recurrent_shapes(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=strict)


def summary(error: BaseException) -> str:
    """Return the first line of an error that says something, without torch's log hints."""
    return f"{type(error).__name__}: {first_line(error, 300)}"
