"""What a model's forward takes: tensors, by position."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxquant.core.errors import CaptureError
from fxquant.core.run import WRAP

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def input_names(model: nn.Module | ExportedProgram) -> list[str]:
    """Return the names of the inputs a model must be given, in order.

    Raises:
        CaptureError: it is no model, or takes an input by keyword only.
    """
    if isinstance(model, ExportedProgram):
        names = list(model.graph_signature.user_inputs)
        return [str(name) for name in names]
    require_module(model)
    parameters = inspect.signature(model.forward).parameters.values()
    required = [p for p in parameters if p.default is inspect.Parameter.empty]
    named = [p.name for p in required if p.kind is inspect.Parameter.KEYWORD_ONLY]
    if named:
        taken = ", ".join([*(p.name for p in required if p.kind in POSITIONAL), *named])
        passed = ", ".join([*(p.name for p in required if p.kind in POSITIONAL), *(f"{n}={n}" for n in named)])
        raise CaptureError(
            f"forward takes {', '.join(named)} by keyword only, and fxquant gives tensors by position; wrap the model "
            f"in a module with `def forward(self, {taken}): return self.model({passed})`"
        )
    if [p.kind for p in parameters] == [inspect.Parameter.VAR_KEYWORD]:
        raise CaptureError(f"forward takes keywords only{WRAP}")
    # forward(*args) and forward(x=None) say nothing about what is needed; one image tensor is the usual case.
    first = [p.name for p in parameters if p.kind in POSITIONAL][:1] or ["input"]
    return [p.name for p in required if p.kind in POSITIONAL] or first


def require_module(model: object) -> None:
    """Do nothing for a module of Python code.

    Raises:
        CaptureError: it is another object, or TorchScript.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model is a {type(model).__name__}; give a torch.nn.Module or an ExportedProgram")
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{path or 'the model'} is TorchScript, which does not export to a graph; give the Python module that "
                "it was scripted or traced from, its weights loaded with load_state_dict(scripted.state_dict())"
            )


def dynamic_shapes(model: nn.Module, axes: list[dict[int, Any] | None]) -> tuple[Any, ...]:
    """Return the free axes in the shape of forward's parameters: those of `*inputs` form a tuple of their own."""
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(axes)
    first = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*axes[:first], tuple(axes[first:])) if len(axes) > first else tuple(axes)
