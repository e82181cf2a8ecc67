"""torch.export, without what it prints, and its errors in one line."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
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
    with torch.no_grad(), recurrent_shapes(), layer_by_layer(), quiet():
        return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=strict)


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Keep attention and transformer layers from running as one op, whose weights could not be quantized."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from printing while it exports: what a user can act on is in the error that it raises."""
    # Its loggers write to the stderr of the time they were made, which no redirection reaches.
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            logging.disable(logging.ERROR)
            yield
        finally:
            logging.disable(before)


def summary(error: BaseException) -> str:
    """Return the first line of an error that says something, without torch's log hints."""
    return f"{type(error).__name__}: {first_line(error, 300)}"
