"""Distribution correction: adjust a unit's float inputs to the activation statistics of the training set.

PD-Quant (arXiv 2212.07048), section 3.3: with a_n the input of a batch normalisation for image n,
    `loss = sum_norms |mean - mean_hw(a_n)|^2 + |sqrt(var + 1e-6) - sqrt(var_hw(a_n) + 1e-6)|^2
            + (1 / lambda_c) mean_hw sum_c (x - x_0)^2`,  mean over images,
minimised over the unit's input x by Adam. It depends on the float network and the images alone, and is done once for
all plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.core.facts import Statistics
from fxquant.core.ir import shape_of
from fxquant.core.run import Span
from fxquant.passes.rounding.learned.tune import channel_sums

RATE, SMALLEST_RATE, PATIENCE, DECAY = 1e-3, 1e-5, 100, 0.1
EPSILON = 1e-6
"""Added under the square root, as in the authors' code."""


def has_statistics(node: Node) -> bool:
    """Whether one image's output of a folded op has a deviation: a linear layer's has one position only."""
    return prod(shape_of(node)[2:]) > 1


def corrected_inputs(
    span: Span,
    inputs: Mapping[str, Tensor],
    statistics: Mapping[str, Statistics],
    steps: int,
    weight: float,
    batch: int,
    track: Callable[[range], Iterable[int]] = lambda starts: starts,
) -> dict[str, Tensor]:
    """Return the corrected inputs, name -> tensor of the shape it had.

    Args:
        span: float unit whose outputs are those of its folded ops, named in `statistics`.
        inputs: input name -> values over all images.
        statistics: folded op -> statistics of its batch normalisation.
        steps: of Adam.
        weight: of the distance from the original inputs, `1 / lambda_c`.
        batch: images at a time; the objective is a mean over images, so that this hardly changes the result.
        track: yields the first image of each batch, showing progress.
    """
    images = len(next(iter(inputs.values())))
    parts: dict[str, list[Tensor]] = {name: [] for name in span.inputs}
    for start in track(range(0, images, batch)):
        piece = {name: inputs[name][start : start + batch] for name in span.inputs}
        for name, value in _correct(span, piece, statistics, steps, weight).items():
            parts[name].append(value)
    return {name: torch.cat(pieces) for name, pieces in parts.items()}


def _correct(
    span: Span, originals: dict[str, Tensor], statistics: Mapping[str, Statistics], steps: int, weight: float
) -> dict[str, Tensor]:
    # Integers, such as token ids, are not corrected.
    floats = [name for name, value in originals.items() if value.is_floating_point()]
    inputs = {name: originals[name].clone().requires_grad_(True) for name in floats}
    if not inputs:
        return originals
    optimizer = torch.optim.Adam(list(inputs.values()), lr=RATE, fused=True)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=DECAY, patience=PATIENCE, min_lr=SMALLEST_RATE
    )
    for _ in range(steps):
        made = span({**originals, **inputs})
        loss = sum((mismatch(value, statistics[name]) for name, value in made.items()), torch.zeros(()))
        held = sum((channel_sums(inputs[name] - originals[name]) for name in inputs), torch.zeros(()))
        loss = loss + weight * held
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        plateau.step(float(loss.detach()))
    return {**originals, **{name: value.detach() for name, value in inputs.items()}}


def mismatch(output: Tensor, known: Statistics) -> Tensor:
    """Return the squared distance of each image's mean and deviation from the stored ones, summed over channels.

    `output` is the folded op's, `factor (a - mean) + shift`, from which the statistics of a follow.
    """
    flat = output.flatten(2)
    # Where the factor is 0 the output does not depend on the input.
    alive = known.factor.abs() > 1e-12
    factor = torch.where(alive, known.factor, torch.ones_like(known.factor))
    deviation, mean = torch.var_mean(flat, dim=2)
    off = (mean - known.shift) / factor
    variance = deviation / factor.square()
    spread = torch.sqrt(known.variance + EPSILON) - torch.sqrt(variance + EPSILON)
    per_channel = off.square() + spread.square()
    return (per_channel * alive).sum(dim=1).mean()
