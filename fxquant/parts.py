"""One part of a model: record the inputs of a submodule, and put a replacement for it back.

For models of which only some submodule can be captured, or is worth quantizing:

    taken = part(model, "backbone", images)
    result = fxquant.quantize(taken.module, taken.inputs, budget)
    smaller = taken.put_back(result.lowered)
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.capture import input_names
from fxquant.core.errors import CalibrationError, CaptureError, MemoryLimitError, OptionError
from fxquant.core.run import LARGEST, CalibrationSet, collect

BATCH = 32


@dataclass(frozen=True)
class Part:
    """A submodule with what it was called with.

    Args:
        model: the whole model; never modified.
        path: the submodule's path in it.
        inputs: its inputs over the calibration images, in the order of its forward.
    """

    model: nn.Module = field(repr=False)
    path: str
    inputs: CalibrationSet = field(repr=False)

    @property
    def module(self) -> nn.Module:
        """The submodule."""
        return self.model.get_submodule(self.path)

    def put_back(self, replacement: nn.Module) -> nn.Module:
        """Return a copy of the model in eval mode with the replacement wherever the submodule is used.

        Args:
            replacement: takes the same inputs, for example `result.lowered` or `result.simulated`.
        """
        own, old = copy.deepcopy(self.model).eval(), self.module
        # One module may be reached by several paths.
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            if module is old:
                own.set_submodule(name, replacement)
        return own


def part(model: nn.Module, path: str, calibration: object, limit: int | None = None) -> Part:
    """Run images through a model and keep what one of its submodules is called with.

    Args:
        model: the whole model; it runs as a copy in eval mode and need not be one that can be captured.
        path: the submodule's path, for example "backbone".
        calibration: batches for the whole model, as for `quantize`.
        limit: images used at most.

    Returns:
        The submodule and its inputs, the images in the order of the calls.

    Raises:
        OptionError: there is no such submodule; the message names what is near.
        CalibrationError: the model does not run on the images, or never calls the submodule.
        CaptureError: the submodule is called with something that is no tensor.
        MemoryLimitError: its inputs take more memory than is kept at most.
    """
    known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if path not in known:
        near = difflib.get_close_matches(path, known, n=3, cutoff=0.3) or known[:3]
        raise OptionError(f"the model has no submodule {path!r}; near: {', '.join(near)}")
    images, own = collect(calibration, input_names(model), limit), copy.deepcopy(model).eval()
    target = own.get_submodule(path)
    calls: list[tuple[Tensor, ...]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        calls.append(_tensors(path, module, args, kwargs))
        if sum(tensor.nbytes for call in calls for tensor in call) > LARGEST:
            raise MemoryLimitError(
                f"the inputs of {path!r} take more than {LARGEST / 1e9:.1f} GB; give fewer images (limit=)"
            )

    with target.register_forward_pre_hook(keep, with_kwargs=True), torch.no_grad():
        for batch in images.batches(BATCH):
            try:
                own(*batch.inputs)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                shapes = [tuple(tensor.shape) for tensor in batch.inputs]
                raise CalibrationError(f"the model does not run on images of shape {shapes}: {error}") from error
    if not calls:
        raise CalibrationError(f"the model never calls {path!r} on these images; name a submodule that runs")
    kinds = {tuple(tuple(tensor.shape[1:]) for tensor in call) for call in calls}
    if len(kinds) > 1:
        raise CaptureError(f"{path!r} is called with inputs of several shapes {sorted(kinds)}; name a part of it")
    return Part(model, path, CalibrationSet(tuple(torch.cat(column) for column in zip(*calls, strict=True))))


def _tensors(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return the inputs of a call in the order of forward.

    Raises:
        CaptureError: an argument without a default is no tensor, or one with a default has another value.
    """
    signature = inspect.signature(module.forward)
    found: list[Tensor] = []
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if isinstance(value, Tensor) and value.dim():
            found.append(value.detach().clone())
        elif not _same(value, signature.parameters[name].default):
            raise CaptureError(
                f"{path!r} is called with {name}={type(value).__name__}, which is no tensor with images along axis 0; "
                "name a submodule that takes tensors only"
            )
    return tuple(found)


def _same(value: object, default: object) -> bool:
    return value is default or (isinstance(value, int | float | str) and value == default)
