"""A network whose curvature is known in closed form: `y = a x_1 + b x_2`, one row of inputs per image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.core.ir import tensor_at
from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity import Scorer
from tests.scoring import inputs, scorer, simulated


@dataclass(frozen=True)
class Linear:
    """Everything about one layer of `SplitNet`.

    Args:
        x: what it reads, shape (images, 8).
        weight: shape (5, 8).
        dx: rounding error of what it reads.
        dw: rounding error of the weight.
    """

    x: Tensor
    weight: Tensor
    dx: Tensor
    dw: Tensor


def split_scorer(count: int, loss: str = "kl", labels: Tensor | None = None) -> Scorer:
    return scorer(simulated("split"), CalibrationSet(inputs("split", count), labels), loss)


def layer(each: Scorer, column: int) -> Linear:
    """Return a column of a scorer of `split` in double precision."""
    own = each.columns[column]
    assert own.site in ("a", "b")
    x = each.images.inputs[0][:, :8] if own.site == "a" else each.images.inputs[0][:, 8:]
    weight = tensor_at(each.program.module, f"{own.site}.weight").detach()
    (dw,) = [r(weight) - weight for name, r in own.substitution.items() if "weight" in name]
    (dx,) = [r(x) - x for name, r in own.substitution.items() if "weight" not in name]
    return Linear(x.double(), weight.double(), dx.double(), dw.double())


def answer(each: Scorer) -> Tensor:
    return torch.cat([each.base(batch).answer for batch in each.batches]).double()


def answer_hessian(each: Scorer) -> Tensor:
    """Return the loss's Hessian in the answer, shape (images, 5, 5)."""
    y = answer(each)
    if each.loss.name == "mse":
        return 2 / y.square().sum(1).reshape(-1, 1, 1) * torch.eye(5, dtype=torch.float64)
    p = torch.softmax(y, dim=1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
