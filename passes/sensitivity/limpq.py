"""`limpq`: steps learned jointly over all widths are the indicators of importance (LIMPQ, arXiv 2203.08368).

Every (layer, width) has a separate step for its weight, and one for what it reads. In each iteration every layer
takes one of its widths at random, and only the steps that took part are trained. A layer that needs fine steps keeps
them small: a larger step is a larger loss to expect.

The paper trains the weights too, for epochs and with labels. Here weights stay, the network follows the float
network's answers on the calibration images, and each step is its calibrated value times a learned factor.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxquant.core.facts import WeightGrids
from fxquant.core.ir import FakeQuantize, Grid, Sites, tensor_at
from fxquant.passes.sensitivity.cell_sweep import Cell
from fxquant.passes.sensitivity.columns import Column, Replacement, RoundedWeight
from fxquant.passes.sensitivity.cotangents import generator, loss_gradient, stream_of
from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Batch, Scorer

ITERATIONS = 96
TOGETHER = 8
"""Images of an iteration."""
RATE = 0.03
"""Adam's rate for the logarithms of the factors."""
ALPHA = 2.0
"""Weight of a weight's step against that of a value, the paper's for ResNet-50."""

Key = tuple[str, float]
"""What is rounded (a site, or an activation node) and the bits."""


@estimator("limpq", float_only=True, unit="learned steps", images=False, work="own")
def limpq(scorer: Scorer) -> Estimate:
    """Return `values = diag(alpha s_w + sum of s_a)`, s the learned steps, inversions repaired (`rising_to_narrow`).

    96 iterations of 8 images each, about 3 passes per image. Standard errors are 0: there is one training run.
    """
    found = scorer.measure("learn steps of all widths", {"steps": lambda: _trained(scorer)})["steps"]
    used = [_parts(column) for column in scorer.columns]
    keys = sorted({key for parts in used for key in parts})
    repaired = dict(zip(keys, found["steps"].tolist(), strict=True))
    of: defaultdict[str, list[Key]] = defaultdict(list)
    for key in keys:
        of[key[0]].append(key)
    for own in of.values():
        # In order of their bits, as they were sorted.
        steps = rising_to_narrow(np.array([repaired[key] for key in own]))
        repaired |= dict(zip(own, steps.tolist(), strict=True))
    sites = {site.name for site in scorer.program[Sites].sites}
    values = [sum((ALPHA if key[0] in sites else 1.0) * repaired[key] for key in parts) for parts in used]
    return Estimate(
        np.diag(np.array(values, dtype=np.float64)), np.zeros((len(used),) * 2), float(found["evaluations"])
    )


def rising_to_narrow(steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return steps that never fall from wider to narrower, each the largest of itself and of all wider ones.

    The paper forbids a width whose indicator is below that of a wider one; with its indicator raised it loses to the
    wider one in score and can only be taken for its cost.

    Args:
        steps: by ascending width.
    """
    return np.asarray(np.maximum.accumulate(steps[::-1])[::-1], dtype=np.float64)


class _Learned:
    """One quantizer with a learned factor on its step: `m Q(x / m)`, so that m has LSQ's gradient."""

    def __init__(self, grid: Grid, fixed: Tensor | None) -> None:
        self.quantizer, self.fixed = FakeQuantize(grid), fixed
        self.start = float((grid.scale * grid.spacing).mean())
        self.factor = torch.zeros((), requires_grad=True)

    def __call__(self, x: Tensor) -> Tensor:
        factor = self.factor.exp()
        rounded: Tensor = self.quantizer((x if self.fixed is None else self.fixed) / factor)
        return rounded * factor

    @property
    def step(self) -> float:
        return self.start * float(self.factor.detach().exp())


def _parts(column: Column) -> dict[Key, list[str]]:
    """Return what a column rounds: key -> the nodes it replaces for it."""
    parts: defaultdict[Key, list[str]] = defaultdict(list)
    for name, replacement in column.substitution.items():
        if isinstance(replacement, RoundedWeight):
            assert column.site is not None
            assert column.weight_bits is not None
            parts[column.site, float(column.weight_bits)].append(name)
        elif isinstance(replacement, FakeQuantize):
            parts[name, float(replacement.spec.bits)].append(name)
    return dict(parts)


def _quantizers(scorer: Scorer) -> dict[Key, _Learned]:
    made: dict[Key, _Learned] = {}
    program = scorer.program
    for column in scorer.columns:
        for key, names in _parts(column).items():
            replacement = column.substitution[names[0]]
            if key in made:
                continue
            if isinstance(replacement, FakeQuantize):
                made[key] = _Learned(replacement.grid, None)
            elif column.site is not None and column.weight is not None:
                value = tensor_at(program.module, program[Sites].by_name(column.site).weight).detach()
                made[key] = _Learned(program[WeightGrids].at(column.site, column.weight), value)
    return made


def _trained(scorer: Scorer) -> Cell:
    learned = _quantizers(scorer)
    owners: defaultdict[str, list[Column]] = defaultdict(list)
    for column in scorer.columns:
        owners[column.owner].append(column)
    draws = generator(stream_of(scorer, 0), 0)
    count, ran = len(scorer.images), 0
    optimizer = torch.optim.Adam([each.factor for each in learned.values()], lr=RATE)
    for _ in range(ITERATIONS):
        images = scorer.images.take(torch.randperm(count, generator=draws)[:TOGETHER].tolist())
        substitution: dict[str, Replacement] = dict(scorer.off)
        for own in owners.values():
            column = own[int(torch.randint(len(own), (), generator=draws))]
            for key, names in _parts(column).items():
                substitution |= dict.fromkeys(names, learned[key])
        with torch.no_grad():
            reference, _ = scorer.replay.forward(images.inputs, scorer.off, frozenset())
        answer, _ = scorer.replay.recorded(images.inputs, substitution)
        if answer.requires_grad:
            slope = loss_gradient(scorer, Batch(0, images), answer, reference)
            optimizer.zero_grad()
            torch.autograd.backward(answer, slope / len(images))
            optimizer.step()
        # Forward of the reference, forward and backward of the rounded network.
        ran += 3 * len(images)
    _ = scorer.take_spent(1)
    steps = np.array([learned[key].step for key in sorted(learned)])
    return {"steps": steps, "evaluations": float(ran)}
