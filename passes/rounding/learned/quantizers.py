"""What is learned in place of a fake-quant node: rounding directions, straight-through weights, activation steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.core.ir import (
    HIGHEST_LEVEL,
    LOWEST_LEVEL,
    SMALLEST_SCALE,
    FakeQuantize,
    Grid,
    round_learned,
    round_to_levels,
    whole_levels,
)

STRETCH = 1.2
"""The sigmoid is stretched to (-0.1, 1.1) and clipped, so that 0 and 1 are reached (AdaRound, arXiv 2004.10568)."""


TRUST = 0.5
"""How far the starting h moves from the float weight's to the level that an earlier algorithm chose.

ResNet-8 at W2A2, `qdrop` of 200 steps behind Qronos: held-out KL 1.4 with a half, 2.2 with .9.
"""
NUDGE = 1e-3
"""Share of a scale that a value is moved off its level, so that it has a neighbour on the intended side."""


class SoftRounding(nn.Module):
    """A weight between two neighbouring levels, by a learned h (AdaRound, arXiv 2004.10568, eq. 22-24).

    `W = scale (low + h (high - low) - zero_point)`, `h = clamp(1.2 sigmoid(a) - 0.1, 0, 1)`. Evenly spaced levels give
    the paper's `clamp(floor(w / scale) + h)`. Initially W is w, and the levels are those next to it. Where an earlier
    algorithm chose a level q, the other one is q's neighbour on the side of w, and initially
    `h = h_w + trust (h_q - h_w)`, with h_w that of w clipped to the two levels, and h_q that of q, 0 or 1.

    Args:
        weight: float32 values to round.
        quantizer: the node's grid.
        chosen: weight of an earlier algorithm, of the shape of weight; None if there is none.
        trust: 0 starts between the two levels where w is, 1 at q.
        learn: whether scales, and levels that are not evenly spaced, are learned too.
    """

    below: Tensor
    above: Tensor
    scale: Tensor
    zero_point: Tensor
    spacing: Tensor
    known: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        quantizer: FakeQuantize,
        chosen: Tensor | None = None,
        trust: float = TRUST,
        learn: bool = False,
    ) -> None:
        super().__init__()
        grid, values = quantizer.grid, weight.detach().float()
        self.spec = grid.spec
        self._grid = grid
        scale, zero_point = grid.along(values, grid.scale), grid.along(values, grid.zero_point).float()
        if chosen is None:
            low, high = (integers - zero_point for integers in grid.neighbours(values))
            fraction = _share(values / scale, low, high)
        else:
            level = grid.round_trip(chosen.detach().float())
            inner = level + NUDGE * scale * torch.where(values < level, -1.0, 1.0)
            low, high = (integers - zero_point for integers in grid.neighbours(inner))
            own, theirs = (_share(at / scale, low, high) for at in (values, level))
            fraction = own + trust * (theirs.round() - own)
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero_point", grid.zero_point)
        self.register_buffer("spacing", grid.spacing)
        self.register_buffer("known", None if grid.levels is None else grid.levels.float())
        # Integers where levels are evenly spaced, else their positions among the channel's levels.
        self.register_buffer("below", low if self.known is None else self._position(low))
        self.register_buffer("above", high if self.known is None else self._position(high))
        self.factor = nn.Parameter(torch.ones_like(grid.scale), requires_grad=learn)
        moves = None if self.known is None else torch.zeros_like(self.known)
        self.moves = None if moves is None else nn.Parameter(moves, requires_grad=learn)
        fraction = fraction.clamp(1e-4, 1 - 1e-4)
        self.logits = nn.Parameter(-torch.log(STRETCH / (fraction + (STRETCH - 1) / 2) - 1))

    def directions(self) -> Tensor:
        """Return h, of the shape of the weight, in 0..1."""
        return (STRETCH * torch.sigmoid(self.logits) - (STRETCH - 1) / 2).clamp(0.0, 1.0)

    def steps(self) -> Tensor:
        """Return the scale, shape (channels,)."""
        return (self.scale * self.factor).clamp(min=SMALLEST_SCALE)

    def whole_levels(self) -> Tensor | None:
        """Return the levels as int8, as the grid will have them; None where they are evenly spaced."""
        levels = self._levels()
        return None if levels is None else whole_levels(levels.detach()).to(torch.int8)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the softly rounded weight in place of the one passed."""
        del weight
        return self._on_grid(self.directions(), self._levels())

    def hard(self) -> Tensor:
        """Return the weight with every h at 0 or 1, on its grid."""
        with torch.no_grad():
            levels = self._levels()
            # Unsorted, so that positions stay those of the levels that were learned.
            whole = None if levels is None else levels.round().clamp(LOWEST_LEVEL, HIGHEST_LEVEL)
            return self._on_grid((self.logits >= 0).float(), whole)

    def penalty(self, beta: float) -> Tensor:
        """Return `sum(1 - |2h - 1|^beta)`, 0 where every h is 0 or 1."""
        return (1 - (2 * self.directions() - 1).abs().pow(beta)).sum()

    def _levels(self) -> Tensor | None:
        if self.known is None or self.moves is None:
            return None
        return self.known + self.moves * self.spacing.unsqueeze(1)

    def _position(self, levels: Tensor) -> Tensor:
        assert self.known is not None
        axis = self.spec.channel_axis or 0
        rows = levels.movedim(axis, 0)
        found = torch.searchsorted(self.known, rows.flatten(1).contiguous())
        return found.reshape(rows.shape).movedim(0, axis)

    def _on_grid(self, h: Tensor, levels: Tensor | None) -> Tensor:
        low, high = self.below, self.above
        if levels is not None:
            low, high = (self._values(levels, positions) for positions in (low, high))
        return (low + h * (high - low)) * self._grid.along(h, self.steps())

    def _values(self, levels: Tensor, positions: Tensor) -> Tensor:
        axis = self.spec.channel_axis or 0
        rows = positions.movedim(axis, 0)
        return levels.gather(1, rows.flatten(1)).reshape(rows.shape).movedim(0, axis)


def _share(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return where x lies between low, 0, and high, 1."""
    return ((x - low) / (high - low).clamp(min=1)).clamp(0.0, 1.0)


class StraightThrough(nn.Module):
    """A weight learned together with its scale and levels; gradients skip the rounding (LSQ, arXiv 1902.08153).

    Learned are factors of the scale, near 1, and shifts of the values and of levels in units of the space between two
    levels, so that one learning rate fits every channel.

    Args:
        weight: float32 values.
        quantizer: the node's grid.
    """

    base: Tensor
    scale: Tensor
    zero_point: Tensor
    spacing: Tensor
    known: Tensor | None

    def __init__(self, weight: Tensor, quantizer: FakeQuantize) -> None:
        super().__init__()
        grid = quantizer.grid
        self.spec = grid.spec
        self.register_buffer("scale", grid.scale)
        self.register_buffer("base", weight.detach().float().clone())
        self.register_buffer("zero_point", grid.zero_point)
        self.register_buffer("spacing", grid.spacing)
        self.register_buffer("known", None if grid.levels is None else grid.levels.float())
        self.shift = nn.Parameter(torch.zeros_like(self.base))
        self.factor = nn.Parameter(torch.ones_like(grid.scale))
        self.moves = None if self.known is None else nn.Parameter(torch.zeros_like(self.known))

    def steps(self) -> Tensor:
        """Return the scale, shape (channels,)."""
        return (self.scale * self.factor).clamp(min=SMALLEST_SCALE)

    def values(self) -> Tensor:
        """Return the values that are rounded, of the shape of the weight."""
        plain = Grid(self.spec, self.scale, self.zero_point)
        return self.base + self.shift * plain.along(self.base, self.scale * self.spacing)

    def levels(self) -> Tensor | None:
        """Return the learned levels as float32 `(channels, L)`, not yet whole; None where they are evenly spaced."""
        if self.known is None or self.moves is None:
            return None
        return self.known + self.moves * self.spacing.unsqueeze(1)

    def whole_levels(self) -> Tensor | None:
        """Return the levels as int8, as the grid will have them."""
        levels = self.levels()
        return None if levels is None else whole_levels(levels.detach()).to(torch.int8)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight in place of the one passed."""
        del weight
        levels = self.levels()
        if levels is None:
            return round_learned(self.values(), self.steps(), self.zero_point, self.spec)
        return round_to_levels(self.values(), self.steps(), levels, self.spec.channel_axis or 0)

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
