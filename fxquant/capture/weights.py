"""Whether a model's weights can be worked with: in memory, dense, float32, finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxquant.core.errors import CaptureError

FAULTS: tuple[tuple[Callable[[Tensor], bool], str], ...] = (
    (lambda t: bool(is_lazy(t)), "has no shape yet (a lazy module); run the model once before"),
    (lambda t: t.is_meta, "has no values (device meta); load the checkpoint before"),
    (lambda t: t.is_quantized, "is quantized already; give the float model"),
    (lambda t: t.layout != torch.strided, "is stored sparsely; make it dense with .to_dense()"),
)
"""What a weight or buffer may not be -> what is said of it."""


def check_storage(model: nn.Module) -> None:
    """Do nothing where every weight is a dense tensor in memory, float32 if it is a floating-point number.

    Raises:
        CaptureError: one is not; the message says what to do.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, tensor in {**parameters, **buffers}.items():
        for has_fault, fault in FAULTS:
            if has_fault(tensor):
                raise CaptureError(f"weight {name!r} {fault}")
    for name, tensor in parameters.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CaptureError(
                f"weight {name!r} is {kind}, and fxquant quantizes float32 networks only; "
                "give model.float(), with images of float32 where the model took others"
            )


def check_finite(model: nn.Module) -> None:
    """Do nothing where weights are finite and buffers hold no NaN.

    Raises:
        CaptureError: one is not; names it.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            count = int((~torch.isfinite(parameter)).sum())
            raise CaptureError(f"weight {name!r} holds {count} values that are NaN or infinite; repair the checkpoint")
    for name, buffer in model.named_buffers():
        # Infinity is at home in buffers: attention masks are made of it.
        if buffer.is_floating_point() and torch.isnan(buffer).any():
            raise CaptureError(f"buffer {name!r} holds {int(buffer.isnan().sum())} NaN values; repair the checkpoint")
