"""A model of what rounding does to the answer, as a function of the factors of channels, and its minimum.

Rounding to a step d adds noise of variance d^2 / 12. With G the squared gradients of random projections of the answer,
summed over positions, s the factors, and [l, h] the range of each class of elements of a value, the rounding of one
value adds

    (max_c s_c h_c - min_c s_c l_c)^2 / (2^a - 1)^2  *  sum_c G_c / s_c^2,

because one step serves all of its channels, and the noise is divided by s_c again in the next layer. The weight of a
layer has a step for each output channel o, and its noise is multiplied by the layer's input:

    sum_o G_o (max_i |W_oi| / s_i)^2 / (2^(w - 1) - 1)^2 / 4  *  sum_i s_i^2 E[x_i^2].

Factors of output channels cancel there. `measure_noise` fills the model in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

STEPS, RATE = 200, 0.05
LARGEST = 5.0
"""Largest logarithm of a factor."""


@dataclass(frozen=True)
class ValueNoise:
    """What the rounding of one value depends on.

    Args:
        group: name of the grid that it shares.
        classes: classes of its elements, shape (K,), each once.
        low: smallest element of each class, or 0, shape (K,).
        high: largest element of each class, or 0, shape (K,).
        sensitivity: G of each class, shape (K,).
        levels: steps of the grid, `2^a - 1`.
    """

    group: str
    classes: Tensor
    low: Tensor
    high: Tensor
    sensitivity: Tensor
    levels: float


@dataclass(frozen=True)
class WeightNoise:
    """What the rounding of one layer's weight depends on; groups of a convolution are rows of a batch.

    Args:
        classes: class of each input channel, shape (groups, columns).
        largest: largest magnitude of the weights of each output and input channel, (groups, rows, columns).
        power: mean square of each input channel, (groups, columns).
        sensitivity: G of each output channel, times the taps of a filter, (groups, rows).
        levels: steps of the grid from 0 to its largest weight, times 2.
    """

    classes: Tensor
    largest: Tensor
    power: Tensor
    sensitivity: Tensor
    levels: float


@dataclass(frozen=True)
class RoundingNoise:
    """The noise of all values and weights, as a function of the factors of the classes.

    Args:
        count: number of classes; class 0 has the factor 1.
        values: every value that carries a quantizer.
        weights: every layer with weights.
    """

    count: int
    values: tuple[ValueNoise, ...] = field(repr=False)
    weights: tuple[WeightNoise, ...] = field(repr=False)

    def total(self, logarithms: Tensor) -> Tensor:
        """Return the squared error of the answer's projections; `logarithms` of the factors, shape (count,)."""
        scale = logarithms.exp()
        top: dict[str, list[Tensor]] = {}
        bottom: dict[str, list[Tensor]] = {}
        for value in self.values:
            factor = scale[value.classes]
            top.setdefault(value.group, []).append((factor * value.high).amax())
            bottom.setdefault(value.group, []).append((factor * value.low).amin())
        widths = {name: torch.stack(top[name]).amax() - torch.stack(bottom[name]).amin() for name in top}
        total = torch.zeros((), dtype=logarithms.dtype)
        for value in self.values:
            noise = (value.sensitivity / scale[value.classes].square()).sum()
            total = total + (widths[value.group] / value.levels).square() * noise
        for weight in self.weights:
            factor = scale[weight.classes]
            largest = (weight.largest / factor.unsqueeze(1)).amax(dim=2)
            power = (factor.square() * weight.power).sum(dim=1, keepdim=True)
            total = total + (weight.sensitivity * largest.square() * power).sum() / weight.levels**2
        return total


def fewest_noise(noise: RoundingNoise) -> Tensor:
    """Return factors of little noise, shape (count,), those of the best of `STEPS` steps of Adam from 1 on."""
    logarithms = torch.zeros(noise.count, dtype=torch.float32, requires_grad=True)
    free = torch.ones(noise.count)
    free[0] = 0
    optimizer = torch.optim.Adam([logarithms], lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    best, least = torch.zeros(noise.count), torch.inf
    for _ in range(STEPS):
        total = noise.total(logarithms).log()
        if float(total.detach()) < least:
            best, least = logarithms.detach().clone(), float(total.detach())
        logarithms.grad = torch.autograd.grad(total, [logarithms])[0] * free
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            logarithms.clamp_(-LARGEST, LARGEST)
    return best.double().exp()
