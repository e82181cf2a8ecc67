"""Models whose forward writes to their own weights: torch.export records that rightly, not at all, or not in time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from fxquant.capture.exporting import quiet
from fxquant.capture.model_outputs import plain_answer
from fxquant.core.errors import CaptureError

NEAR = 1e-3
"""Of the largest value, what a program's answer may be off by, for sums may be formed in another order."""


def called_once(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[tuple[str, ...], Any]:
    """Return the names of the weights and buffers that a call changes, and its answer, None where it has none.

    Args:
        model: it stays as it is.
        inputs: one tensor per input.
    """
    called = copy.deepcopy(model).eval()
    held = {**dict(called.named_parameters()), **dict(called.named_buffers())}
    try:
        with torch.no_grad(), quiet(), torch.random.fork_rng(devices=[]):
            answer = plain_answer(called(*inputs))
    except Exception:
        # Export meets the same error and says what to do.
        return (), None
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return tuple(name for name, value in held.items() if not _equal(value, before[name])), answer


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


def check_written(exported: ExportedProgram, inputs: tuple[Tensor, ...], written: tuple[str, ...], answer: Any) -> None:
    """Do nothing where a program answers as the model that writes to its weights does.

    Args:
        exported: what was made of the model.
        inputs: what the model was called with.
        written: weights that this call changed.
        answer: of this call.

    Raises:
        CaptureError: it answers otherwise.
    """
    if not written:
        return
    with torch.no_grad(), quiet():
        mine = exported.module(check_guards=False)(*inputs)
    pairs = zip(tree_leaves(mine), tree_leaves(answer), strict=True)
    if not all(_near(one, other) for one, other in pairs if isinstance(other, Tensor)):
        raise CaptureError(advice(written))


def _near(one: Tensor, other: Tensor) -> bool:
    if not other.is_floating_point() or not other.numel():
        return True
    return float((one - other).abs().max()) <= NEAR * max(float(other.abs().max()), 1e-6)


def advice(written: tuple[str, ...]) -> str:
    """Return what to do about a model that writes to its weights."""
    more = f" and to {len(written) - 1} more" if len(written) > 1 else ""
    return (
        f"forward writes to weight {written[0]!r}{more} at every call, which torch.export does not record; call the "
        "model once, then take the writing out of forward, or put the layer with the finished weight in the place of "
        "the module that computes it"
    )
