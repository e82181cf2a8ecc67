"""Qronos: like GPTQ, but aims at the float network's outputs on the quantized network's inputs (arXiv 2505.11695)."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fxquant.core.errors import FailureError
from fxquant.core.facts import Target
from fxquant.core.ir import Program, RowGrid, WeightFormat
from fxquant.passes.formats import RATIOS, RowProblem, find
from fxquant.passes.rounding.closed_form.descent import refined
from fxquant.passes.rounding.closed_form.gptq import gptq_rows
from fxquant.passes.rounding.closed_form.input_gram import Moments
from fxquant.passes.rounding.closed_form.layerwise import on_own_grid, round_layerwise
from fxquant.passes.rounding.closed_form.output_moments import OutputMoments
from fxquant.passes.rounding.closed_form.verdict import judged
from fxquant.passes.rounding.registry import ROUNDERS, RoundingTask

DAMPING = 0.01
"""Pull toward the float weight, as a share of the mean diagonal of H, as published."""

DAMPINGS = (0.01, 0.05, 0.25, 1.25)
"""Those that are tried on one half of the images for outputs on the other: few images need more. With 24 images all
layers of MobileNetV2 at 4 bits lose .155 (KL) instead of .370 with the published one."""

ERRORS = 0.05
"""What H is damped by where it weighs errors of rounding, whatever the pull: with a strong one all columns would count
alike (ResNet-20 at 3 bits: KL .046 instead of .031)."""

ALREADY_DAMPED = 1e-9
"""What GPTQ adds to moments that are damped already."""

FRONT = 2 / 3
"""Share of the layers that aim at the float network's outputs in any case. Behind them GPTQ divides the KL of plans of
3 bits on average by 1.2 to 2 on DeiT-tiny, MobileNetV2 and EfficientNet-Lite0; on ResNet-20 all layers should aim."""

DESCENT_BELOW = 3
"""Bits below which integers and scales are improved by coordinate descent."""

ATTEMPTS = 12


@ROUNDERS.register("qronos")
def qronos(task: RoundingTask) -> Program:
    """Round each layer's weight so that its output on the quantized network follows the float network's output.

    `min_{Q, b} sum |y - Q x - b|^2`, y the float network's output and x what the quantized network reads: errors of
    earlier layers are corrected as well as those of earlier columns. Scales stay those of the grid; arXiv 2505.11695,
    algorithm 1 and theorem 4.1, with a bias as one more input that is not rounded.
    """
    started = time.perf_counter()
    rounding = round_layerwise(task, _rows, "qronos", aim=partial(aimed, damping=DAMPING, from_float=True))
    return judged(task, rounding, "qronos", time.perf_counter() - started)


@ROUNDERS.register("qronos_rescaled")
def qronos_rescaled(task: RoundingTask) -> Program:
    """Qronos with each channel's levels found again, for the least output error of the algorithm itself on them.

    The paper takes scales as given. The values that are rounded here are not the float weights: to compensate other
    errors they spread wider, and the scales that fit them halve the output error at 2 bits. A target with one scale
    for a whole weight keeps the plan's.

    The outputs of the last layers are near the answers, and follow the calibration images more than others: there GPTQ
    is tried as well, on what the quantized network gives them, and the verdict chooses.
    """
    started = time.perf_counter()
    fit = refitted if task.program[Target].per_channel else on_own_grid
    count = round(FRONT * len(task.sites))
    front = round_layerwise(task, _rows, "qronos_rescaled", fit=fit, aim=aimed, count=count)
    if count == len(task.sites):
        return judged(task, front, "qronos_rescaled", time.perf_counter() - started)
    plain = round_layerwise(task, gptq_rows, "qronos_rescaled, GPTQ for the last layers", fit=fit, front=front)
    whole = round_layerwise(task, _rows, "qronos_rescaled, last layers", fit=fit, aim=aimed, front=front)
    return judged(task, (plain, whole), "qronos_rescaled", time.perf_counter() - started)


def refitted(problem: RowProblem, own: RowGrid, weight: WeightFormat) -> tuple[RowGrid, Tensor]:
    """Return the levels of a format that fit the rows which are rounded, whatever the plan's own are, and integers.

    Below 3 bits coordinate descent takes another fifth off the network's KL; above it changes nothing that shows.
    """
    del own
    found = find(replace(problem, ratios=RATIOS), weight)
    grid, integers = on_own_grid(problem, found, weight)
    return refined(problem, grid, integers) if weight.bits < DESCENT_BELOW else (grid, integers)


def aimed(
    rows: Tensor, moments: OutputMoments, damping: float | None = None, from_float: bool = False
) -> tuple[Tensor, Moments]:
    """Return the rows to round instead of the float weight, and the moments that weigh errors at them.

    `T = argmin sum |y - T x - b|^2 + l |T - W|^2 = (C' + l W)(H + l I)^-1` with `l = damping mean(H_jj)`: any rows Q
    then cost `tr((T - Q)(H + l I)(T - Q)')` more than T. Once a column is rounded, the best values of all later ones
    are those of GPTQ, started at T; if inputs have no error, T = W. Where l is chosen here, `ERRORS` takes its place in
    weighing what rounding adds.

    Args:
        rows: the float weight W, float64 of shape (groups, rows, K).
        moments: of the op.
        damping: share of the mean diagonal, above 0; None takes what fits best on either half of the images for the
            other one.
        from_float: choose the first column that is rounded as the paper does: its best value while all others stay at
            the float weight, instead of its best value overall.

    Raises:
        FailureError: H cannot be factored, however damped: it is not finite.
    """
    added = _added(moments.gram, _fitting(rows, moments) if damping is None else damping)
    for _ in range(ATTEMPTS):
        gram = moments.gram + torch.diag_embed(added)
        root, failed = torch.linalg.cholesky_ex(gram)
        if not failed.any():
            break
        added = added * 10.0
    else:
        raise FailureError(
            "the second moments of the inputs cannot be factored: activations of the network are not finite; "
            "check the model on the calibration images"
        )
    target = _pulled(rows, moments.cross, added, root)
    if from_float:
        target = target + _first_step(target - rows, gram, root)
    if damping is None:
        gram = moments.gram + torch.diag_embed(_added(moments.gram, ERRORS))
    return target, Moments(gram, gram)


def _fitting(rows: Tensor, moments: OutputMoments) -> float:
    """Return the damping whose rows, found on either half of the images, lose least on the other; the least without."""
    if not moments.halves:
        return DAMPINGS[0]
    losses = dict.fromkeys(DAMPINGS, 0.0)
    for half, other in (moments.halves, moments.halves[::-1]):
        # To choose, float32 is enough, and takes half of the time.
        gram, cross, plain = half.gram.float(), half.cross.float(), rows.float()
        for damping in DAMPINGS:
            added = _added(gram, damping)
            root, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(added))
            lost = float(other.error(_pulled(plain, cross, added, root).double()).sum())
            losses[damping] += lost if math.isfinite(lost) and not failed.any() else math.inf
    return min(losses, key=losses.__getitem__)


def _pulled(rows: Tensor, cross: Tensor, added: Tensor, root: Tensor) -> Tensor:
    """Return `(C' + l W)(H + l I)^-1`, root being the Cholesky factor of `H + l I`."""
    return torch.cholesky_solve(cross + added.unsqueeze(2) * rows.transpose(1, 2), root).transpose(1, 2)


def _added(gram: Tensor, damping: float) -> Tensor:
    mean = gram.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)
    # A group that read only zeros keeps its weights.
    return torch.where(mean > 0, damping * mean, torch.ones_like(mean)).expand(gram.shape[:2])


def _first_step(ahead: Tensor, gram: Tensor, root: Tensor) -> Tensor:
    """Return how the best rows move when the first column is put at its best value for the float weight.

    That value is `T_1 + sum_{k > 1} H_1k (T_k - W_k) / H_11`, and every other column follows as the inverse of H says.
    """
    order = gram.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    first = order[:, :1].unsqueeze(2)
    across = gram.gather(1, first.expand(-1, 1, gram.shape[2]))
    # The sum over all k holds T_1 - W_1 itself, which is left out.
    own = ahead.gather(2, first.expand(-1, ahead.shape[1], 1))
    step = (ahead @ across.transpose(1, 2)) / across.gather(2, first) - own
    unit = torch.zeros_like(across).scatter_(2, first, 1.0).transpose(1, 2)
    column = torch.cholesky_solve(unit, root).transpose(1, 2)
    return step * (column / column.gather(2, first))


_rows = partial(gptq_rows, damping=ALREADY_DAMPED)
