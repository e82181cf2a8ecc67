from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fxquant.capture import check_finite, check_storage
from fxquant.core.errors import CaptureError


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def put(path: str, change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Return the network with one tensor changed."""
    model = network()
    place, _, leaf = path.rpartition(".")
    owner = model.get_submodule(place)
    known = getattr(owner, leaf)
    changed = change(known.detach())
    setattr(owner, leaf, nn.Parameter(changed) if isinstance(known, nn.Parameter) else changed)
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: put("0.weight", lambda t: t.to("meta")), r"^weight '0\.weight' has no values"),
        (lambda: put("1.running_var", lambda t: t.to("meta")), r"^weight '1\.running_var' has no values"),
        (lambda: put("2.weight", lambda t: t.to_sparse()), r"'2\.weight' is stored sparsely.*to_dense"),
        (lambda: put("2.weight", lambda t: t.to_sparse_csr()), r"'2\.weight' is stored sparsely"),
        (
            lambda: put("1.running_mean", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
            r"'1\.running_mean' is quantized already; give the float model",
        ),
        (lambda: network().bfloat16(), r"'0\.weight' is bfloat16, and .* give model\.float\(\)"),
        (lambda: network().half(), r"'0\.weight' is float16"),
        (lambda: network().double(), r"'0\.weight' is float64"),
        (lazy, r"'0\.weight' has no shape yet"),
    ],
)
def test_weights_that_cannot_be_worked_with(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        check_storage(make())


def test_weights_that_can() -> None:
    check_storage(network())
    check_storage(put("0.weight", lambda t: t.t().contiguous().t()))
    # Tables, counters and constants may be of any type.
    check_storage(put("1.running_mean", torch.Tensor.double))
    check_finite(put("1.running_var", lambda t: t + torch.inf))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(value: float) -> None:
    with pytest.raises(CaptureError, match=r"weight '2\.bias' holds 2 values that are NaN or infinite"):
        check_finite(put("2.bias", lambda t: torch.full_like(t, value)))
