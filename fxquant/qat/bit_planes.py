"""Weights as bit planes that are parameters (BSQ, arXiv 2102.10462, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.core.ir import FakeQuantize
from fxquant.qat.replaced_quantizers import WeightForm

TOP = 2.0
"""Largest value of an element of a plane: a bit, and its carry."""


class BitPlanes(WeightForm):
    """A weight as signed sum of planes: `w = step * Round(sum_b 2^b (P_b - N_b))`, elements in [0, 2], one of two 0.

    The rounding lets gradients through, `dL/dP_b = 2^b step dL/dw = -dL/dN_b` (eq. 3). Planes from `low` to below
    `high` take part; the integers are whole multiples of `2^low`. The width is `high - low + 1`, one bit for the sign.

    The parameters are `2^b (P_b - N_b)`, in [-2^(b+1), 2^(b+1)]: apart, P and N would stop at 0 on one side only, and
    the noise of Adam's strides would shrink all weights together. The group penalty is no part of the loss, for where
    that is flat Adam would shrink all planes at full speed: `shrink` takes it.

    Args:
        weight: float, rounded to the nearest integers of the grid, which are the planes' first bits.
        quantizer: of the weight, on evenly spaced levels; its step is copied.
        weight_lr: Adam's rate of the weight, which is shared among its planes.
        step_lr: the same for steps, relative to each.
    """

    low: Tensor
    high: Tensor
    wanted: Tensor

    def __init__(self, weight: Tensor, quantizer: FakeQuantize, weight_lr: float, step_lr: float) -> None:
        super().__init__()
        grid = quantizer.grid
        count = grid.spec.bits - 1
        self._axis, self._rates = grid.spec.channel_axis, (weight_lr, step_lr)
        self.step = nn.Parameter(grid.scale)
        self.register_buffer("low", torch.tensor(0))
        self.register_buffer("high", torch.tensor(count))
        #: the width to shrink to; part of the state, so that a resumed run goes on with it
        self.register_buffer("wanted", torch.tensor(count + 1))
        self.planes = nn.Parameter(torch.zeros(count, *weight.shape))
        # The lopsided lowest integer of a signed grid has no plane.
        self._write(grid.quantize(weight).clamp(1 - 2**count, 2**count - 1))

    @property
    def live(self) -> range:
        """The planes that take part."""
        return range(int(self.low), int(self.high))

    @property
    def width(self) -> int:
        """Bits of the weight, its sign included."""
        return len(self.live) + 1

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized weight; x, the weight before training, is not used."""
        del x
        exact = self._sum()
        unit = 2.0 ** int(self.low)
        whole = exact + ((exact / unit).round() * unit - exact).detach()
        return whole * self.along(self.step)

    def weight(self) -> Tensor:
        """Return the weight before rounding."""
        return (self._sum() * self.along(self.step)).detach()

    def groups(self) -> list[dict[str, Any]]:
        """Return two parameter groups, planes and steps."""
        (weight_lr, step_lr), mean = self._rates, float(self.step.detach().mean())
        # A change of the weight moves every plane.
        plane_lr = weight_lr / mean / len(self.planes)
        return [{"params": [self.planes], "lr": plane_lr}, {"params": [self.step], "lr": step_lr * mean}]

    def norms(self) -> Tensor:
        """Return the norm over all elements of each live plane, `|[P_b, N_b]|`, shape (live planes,) (eq. 4)."""
        powers = self._powers()[int(self.low) : int(self.high)]
        live = self.planes[int(self.low) : int(self.high)] / powers
        # The norm of a plane of zeros has no slope.
        return (live.square().flatten(1).sum(dim=1) + 1e-12).sqrt()

    @torch.no_grad()
    def shrink(self, amount: float) -> None:
        """Take the group penalty's proximal step, and bring elements back into [0, 2] and, in dropped planes, to 0.

        `P_b <- max(0, 1 - amount 4^(low - b) / rms(P_b - N_b)) P_b`, N_b alike. The factor of 4 for each plane is that
        of the parameters, whose slopes fall by 2 and whose elements are 2 times as large.

        Args:
            amount: by how much the lowest live plane shrinks, as a share of a full plane; planes that stay at the
                `wanted` width do not.
        """
        _ = self.planes.clamp_(min=-TOP * self._powers(), max=TOP * self._powers())
        count = self.planes[0].numel() ** 0.5
        factors = torch.zeros(len(self.planes))
        going = self.width - int(self.wanted)
        for position, (plane, norm) in enumerate(zip(self.live, self.norms().tolist(), strict=True)):
            if position >= going:
                factors[plane] = 1.0
                continue
            factors[plane] = max(0.0, 1.0 - amount * 4.0 ** (int(self.low) - plane) * count / norm)
        _ = self.planes.mul_(factors.reshape(self._powers().shape))

    @torch.no_grad()
    def requantize(self, narrower: bool = False) -> None:
        """Make planes of whole bits again, and drop highest and lowest planes that are all zero (section 3.3).

        Weights keep their integers, so that the network computes the same; values beyond the live planes are clipped.
        What rounding takes from a weight stays in its element of the lowest live plane, so that a later, coarser
        rounding is of the weight itself.

        Args:
            narrower: drop another plane before: the lowest, values rounded to the nearest integers left, or the
                highest, values clipped, whichever changes the weight less.
        """
        if narrower and len(self.live) > 1:
            self._set(*self._narrower(self._sum())[1])
        q, low = self.integers(), int(self.low)
        self._set(low, max(low + 1, min(int(self.high), int(q.abs().max()).bit_length())))
        while len(self.live) > 1 and not bool((q.remainder(2 ** (low + 1)) != 0).any()):
            low += 1
            self._set(low, int(self.high))
        unit, top = 2.0**low, 2.0 ** int(self.high) - 2.0**low
        value = self._sum().clamp(-top - unit / 2, top + unit / 2)
        self._write(q)
        self.planes[low] += value - q

    @torch.no_grad()
    def error_narrower(self) -> Tensor:
        """Return by how much the weight is off without another plane, of its shape."""
        value = self._sum()
        return (self._narrower(value)[0] - value) * self.along(self.step)

    @torch.no_grad()
    def integers(self) -> Tensor:
        """Return the integers, clipped to what the live planes hold, int64 of the weight's shape."""
        unit, top = 2 ** int(self.low), 2 ** int(self.high) - 2 ** int(self.low)
        return torch.clamp((self._sum() / unit).round() * unit, -top, top).long()

    def _narrower(self, value: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return integers and live planes without the lowest or the highest one, whichever changes the weight less."""
        found = []
        for low, high in ((int(self.low) + 1, int(self.high)), (int(self.low), int(self.high) - 1)):
            unit, top = 2.0**low, 2.0**high - 2.0**low
            found.append((((value / unit).round() * unit).clamp(-top, top), (low, high)))
        step = self.along(self.step.detach())
        return min(found, key=lambda each: float(((each[0] - value) * step).square().sum()))

    def _sum(self) -> Tensor:
        return self.planes.sum(dim=0)

    def _powers(self) -> Tensor:
        """Return 2^b for every plane, so that it broadcasts over planes."""
        powers = 2.0 ** torch.arange(len(self.planes), dtype=torch.float32)
        return powers.reshape(-1, *[1] * (self.planes.dim() - 1))

    def _write(self, q: Tensor) -> None:
        with torch.no_grad():
            for plane in range(len(self.planes)):
                self.planes[plane] = (q.sign() * (q.abs() & (1 << plane))).to(self.planes.dtype)

    def _set(self, low: int, high: int) -> None:
        _ = self.low.fill_(low)
        _ = self.high.fill_(high)

    def along(self, step: Tensor) -> Tensor:
        """Return a value for each channel so that it broadcasts over the weight."""
        if self._axis is None or step.dim() == 0:
            return step
        shape = [1] * (self.planes.dim() - 1)
        shape[self._axis] = -1
        return step.reshape(shape)
