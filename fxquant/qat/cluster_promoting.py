"""Cluster-promoting quantization with bits dropped at random (CPQ and DropBits, arXiv 2109.02100)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.core.ir import FakeQuantize
from fxquant.qat.replaced_quantizers import WeightForm

TEMPERATURE, LOWER, UPPER = 2 / 3, -0.1, 1.1
"""Of hard concrete gates (arXiv 1712.01312, section 4)."""
NARROWEST = 2
"""Bits that are never dropped."""
START_OPEN = 2.2
"""Log-odds of a gate at the start: open nine times in ten."""
FAR = 8.0
"""Spreads from the edge of a cell at which the logistic function is an exponential to seven digits."""
SPREAD = 1 / 3
"""Spread sigma of the noise at the start, as a share of the step."""


def probability(u: Tensor, q: Tensor, spread: Tensor, lowest: int, highest: int) -> Tensor:
    """Return the probability of integer q for values u, `r = pi_q / sum_j pi_j` over `lowest..highest`.

    `pi_q = S((q + 1/2 - u) / sigma) - S((q - 1/2 - u) / sigma)`, S the logistic function (eq. 2).

    Args:
        u: values over the step.
        q: integers of the shape of u.
        spread: sigma over the step, above 0, shape ().
        lowest, highest: ends of the grid.
    """

    def below(edge: Tensor) -> Tensor:
        return torch.sigmoid((edge - u) / spread)

    low, high = (torch.full_like(u, end) for end in (lowest - 0.5, highest + 0.5))
    whole: Tensor = (below(high) - below(low)).clamp(min=1e-12)
    return (below(q + 0.5) - below(q - 0.5)) / whole


def _log_mass(distance: Tensor, spread: Tensor) -> Tensor:
    """Return log pi of points at a distance in steps, without underflow of those far away: there it falls as a line."""
    far = (distance.abs() - 0.5) / spread
    mass = torch.sigmoid(-far) - torch.sigmoid(-far - 1.0 / spread)
    return torch.where(far < FAR, mass.clamp(min=1e-30).log(), -far + torch.log1p(-torch.exp(-1.0 / spread)))


def nearest_of_level(u: Tensor, width: int, bits: int) -> Tensor:
    """Return the nearest integer to u among those that a width adds to the narrower ones, of the shape of u.

    Widths halve the step one after the other: of the integers of `bits` bits, those of 2 bits are the multiples of
    `2^(bits - 2)`, and width k adds the odd multiples of `2^(bits - k)`.
    """
    unit, lowest = 2 ** (bits - width), -(2 ** (bits - 1))
    if width == NARROWEST:
        return torch.clamp((u / unit).round() * unit, lowest, -lowest - unit)
    odd = (2 * ((u / unit - 1) / 2).round() + 1) * unit
    return torch.clamp(odd, lowest + unit, -lowest - unit)


class ClusterPromoting(WeightForm):
    """A weight that takes the grid point of most probability, the finest points dropped at random.

    Forward `w_q = step q*`, `q* = argmax_q r_q z_k(q)`, z_k the gate of the width that adds q; backward the multi-class
    straight-through estimator, `dL/dr_q* = dL/dy_q*` with `w_q = sum_q y_q step q`, and none to other points. The gates
    are hard concrete: `z_k = min(1, max(0, 1.2 S((log u - log(1 - u) + a_k) / (2/3)) - 0.1))`, u uniform. A width is
    there only with all narrower ones: gates are multiplied.

    Args:
        weight: float.
        quantizer: of the weight at its widest, on evenly spaced levels; its step is copied.
        weight_lr: Adam's rate for the weight.
        step_lr: the same for steps, relative to each.
        gate_lr: the same for log-odds and spread.
        seed: of the noise.
    """

    drawn: Tensor

    def __init__(
        self, weight: Tensor, quantizer: FakeQuantize, weight_lr: float, step_lr: float, gate_lr: float, seed: int
    ) -> None:
        super().__init__()
        grid = quantizer.grid
        self.bits, self._axis = grid.spec.bits, grid.spec.channel_axis
        self._rates, self._seed = (weight_lr, step_lr, gate_lr), seed
        self.latent, self.step = nn.Parameter(weight.clone()), nn.Parameter(grid.scale)
        self.log_spread = nn.Parameter(torch.tensor(math.log(SPREAD)))
        self.odds = nn.Parameter(torch.full((self.bits - NARROWEST,), START_OPEN))
        #: forward passes so far, so that each has noise of its own, a resumed run's too
        self.register_buffer("drawn", torch.tensor(0))

    @property
    def widths(self) -> range:
        """All widths."""
        return range(NARROWEST, self.bits + 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized weight; x, the weight before training, is not used."""
        del x
        return self.quantized(self.gates())

    def gates(self) -> Tensor:
        """Return gates drawn at random, 1 for the narrowest width, shape (widths,), in 0..1."""
        generator = torch.Generator().manual_seed((self._seed + int(self.drawn)) % 2**63)
        _ = self.drawn.add_(1)
        u = torch.rand(len(self.odds), generator=generator).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid((u.log() - (1 - u).log() + self.odds) / TEMPERATURE)
        hard = (soft * (UPPER - LOWER) + LOWER).clamp(0.0, 1.0)
        return torch.cat((torch.ones(1), hard.cumprod(dim=0)))

    def quantized(self, gates: Tensor) -> Tensor:
        """Return the quantized weight for given gates, shape (widths,)."""
        step, spread = self._along(self.step), self.log_spread.exp()
        u, ends = self.latent / step, (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        with torch.no_grad():
            points = torch.stack([nearest_of_level(u, width, self.bits) for width in self.widths])
            shape = (-1, *[1] * u.dim())
            # What is beyond the ends goes to the nearest point as what is at them.
            inside = u.clamp(*ends)
            best = (_log_mass(inside - points, spread) + gates.log().reshape(shape)).argmax(dim=0)
            q = points.gather(0, best.unsqueeze(0)).squeeze(0)
        taken = probability(u, q, spread, *ends) * gates[best]
        # One in the forward pass, the point's probability in the backward pass.
        value: Tensor = step * q
        return value + value * (taken - taken.detach())

    def chances_open(self) -> Tensor:
        """Return the probability that each width is there, shape (widths,): products of `P(z > 0)` of the gates."""
        single = torch.sigmoid(self.odds - TEMPERATURE * math.log(-LOWER / UPPER))
        return torch.cat((torch.ones(1), single.cumprod(dim=0)))

    def weight(self) -> Tensor:
        """Return the weight before rounding."""
        return self.latent.detach().clone()

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups: weight, steps, gates with the spread."""
        weight_lr, step_lr, gate_lr = self._rates
        rate = step_lr * float(self.step.detach().mean())
        gates = {"params": [self.odds, self.log_spread], "lr": gate_lr}
        return [{"params": [self.latent], "lr": weight_lr}, {"params": [self.step], "lr": rate}, gates]

    def _along(self, step: Tensor) -> Tensor:
        if self._axis is None or step.dim() == 0:
            return step
        shape = [1] * self.latent.dim()
        shape[self._axis] = -1
        return step.reshape(shape)
