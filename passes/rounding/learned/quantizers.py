"""What is learned in place of a fake-quant node: rounding directions, straight-through weights, activation steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.core.ir import SMALLEST_SCALE, FakeQuantize, Grid, round_learned

STRETCH = 1.2
"""The sigmoid is stretched to (-0.1, 1.1) and clipped, so that 0 and 1 are reached (AdaRound, arXiv 2004.10568)."""


class SoftRounding(nn.Module):
    """A weight whose values are rounded down, plus a learned `h` in 0..1 (AdaRound, arXiv 2004.10568, eq. 22-24).

    `W = scale (clamp(floor(w / scale) + h + zero_point, qmin, qmax) - zero_point)`, `h = clamp(1.2 sigmoid(a) - 0.1,
    0, 1)`, with `a` such that initially W is w.

    Args:
        weight: float32 values to round.
        quantizer: the node's grid.
    """

    floor: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor, quantizer: FakeQuantize) -> None:
        super().__init__()
        grid = quantizer.grid
        self.spec = grid.spec
        scale, zero_point = grid.along(weight, grid.scale), grid.along(weight, grid.zero_point).float()
        ratio = weight.detach().float() / scale
        self.register_buffer("floor", torch.floor(ratio) + zero_point)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        fraction = (ratio - torch.floor(ratio)).clamp(1e-4, 1 - 1e-4)
        self.logits = nn.Parameter(-torch.log(STRETCH / (fraction + (STRETCH - 1) / 2) - 1))

    def directions(self) -> Tensor:
        """Return h, of the shape of the weight, in 0..1."""
        return (STRETCH * torch.sigmoid(self.logits) - (STRETCH - 1) / 2).clamp(0.0, 1.0)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the softly rounded weight in place of the one passed."""
        del weight
        return self._on_grid(self.directions())

    def hard(self) -> Tensor:
        """Return the weight with every h at 0 or 1, on its grid."""
        return self._on_grid((self.logits.detach() >= 0).float())

    def penalty(self, beta: float) -> Tensor:
        """Return `sum(1 - |2h - 1|^beta)`, 0 where every h is 0 or 1."""
        return (1 - (2 * self.directions() - 1).abs().pow(beta)).sum()

    def _on_grid(self, h: Tensor) -> Tensor:
        return (torch.clamp(self.floor + h, self.spec.qmin, self.spec.qmax) - self.zero_point) * self.scale


class StraightThrough(nn.Module):
    """A weight learned together with its scale; gradients skip the rounding (LSQ, arXiv 1902.08153).

    Learned are factors of the scale, near 1, and shifts of the values in units of the scale, so that one learning rate
    fits every channel.

    Args:
        weight: float32 values.
        quantizer: the node's grid.
    """

    base: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor, quantizer: FakeQuantize) -> None:
        super().__init__()
        self.spec = quantizer.spec
        self.register_buffer("scale", quantizer.scale.clone())
        self.register_buffer("base", weight.detach().float().clone())
        self.register_buffer("zero_point", quantizer.zero_point.clone())
        self.shift = nn.Parameter(torch.zeros_like(self.base))
        self.factor = nn.Parameter(torch.ones_like(quantizer.scale))

    def steps(self) -> Tensor:
        """Return the scale, shape (channels,)."""
        return (self.scale * self.factor).clamp(min=SMALLEST_SCALE)

    def values(self) -> Tensor:
        """Return the values that are rounded, of the shape of the weight."""
        return self.base + self.shift * Grid(self.spec, self.scale, self.zero_point).along(self.base, self.scale)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight in place of the one passed."""
        del weight
        return round_learned(self.values(), self.steps(), self.zero_point, self.spec)

    def hard(self) -> Tensor:
        """Return the weight on its grid."""
        with torch.no_grad():
            return self.forward(self.base)


class LearnedActivation(nn.Module):
    """An activation quantizer with a learned step that leaves random elements unrounded (QDrop, arXiv 2203.05740).

    Args:
        quantizer: the node's grid, one scale for the tensor.
        learn: whether the step is learned.
        drop: probability that an element stays unrounded.
        generator: draws those elements; None for the global one.
    """

    zero_point: Tensor
    start: Tensor

    def __init__(self, quantizer: FakeQuantize, learn: bool, drop: float, generator: torch.Generator | None) -> None:
        super().__init__()
        self.spec = quantizer.spec
        self.drop = drop
        self.register_buffer("start", quantizer.scale.clone())
        self.register_buffer("zero_point", quantizer.zero_point.clone())
        # The factor is learned, not the step, so that one rate fits all steps.
        self.factor = nn.Parameter(torch.ones_like(quantizer.scale), requires_grad=learn)
        self._generator = generator

    def steps(self) -> Tensor:
        """Return the scale, shape (), kept above 0."""
        return (self.start * self.factor).clamp(min=SMALLEST_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid; while training, some elements unrounded."""
        rounded = random_mask(x, 1 - self.drop, self._generator) if self.drop and self.training else None
        return round_learned(x, self.steps(), self.zero_point, self.spec, rounded)


def random_mask(like: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """Return ones and zeros of the shape and type of `like`, each element one with this probability, in steps of 1/256.

    One random byte decides each element, at an eighth of the cost of PyTorch's Bernoulli draws on a CPU.
    """
    limit = round(probability * 256)
    # The comparison is between bytes, where 256 would wrap to 0.
    if limit >= 256:
        return torch.ones_like(like)
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64, device=like.device).random_(
        -(2**63), 2**63 - 1, generator=generator
    )
    draws = words.view(torch.uint8)[: like.numel()].view(like.shape)
    return (draws < limit).to(like.dtype)
