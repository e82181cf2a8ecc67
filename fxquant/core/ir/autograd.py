"""Re-enable autograd inside `torch.no_grad` and `torch.inference_mode`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def gradients() -> Iterator[None]:
    """Record gradients in the block, under `torch.no_grad` and `torch.inference_mode` as well."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def differentiable(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy of one made under `torch.inference_mode`, which no gradient can pass."""
    if not tensor.is_inference():
        return tensor
    with gradients():
        return tensor.clone()
