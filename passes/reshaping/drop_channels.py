"""Structured pruning with reconstruction: input channels are left out, and the weights of all others make up for them.

Leaving out the columns B of a weight W whose input has second moments H, and letting all other columns follow by least
squares, costs `tr(W_B (H^-1)_BB^-1 W_B')` and gives `W <- W - W_B (H^-1)_BB^-1 (H^-1)_B,:` (the optimal brain surgeon
for blocks, arXiv 2208.11580, eq. 3; for structures arXiv 2302.04089). One channel after the other goes, the cheapest
first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.core.errors import OptionError

DAMPING = 1e-3
"""Share of the mean diagonal of H that is added to it."""


@dataclass(frozen=True)
class Dropped:
    """A weight without some of its input channels.

    Args:
        channels: those left out, the first to go first.
        rows: the weight with their columns at 0 and all others reconstructed, shape (rows, K).
        cost: what it costs, `tr(D H D')`, D the change of the weight, in squared output units.

    Raises:
        OptionError: a channel is left out twice.
    """

    channels: tuple[int, ...]
    rows: Tensor
    cost: float

    def __post_init__(self) -> None:
        if len(set(self.channels)) != len(self.channels):
            raise OptionError(f"channels {self.channels} hold one twice")


def drop_channels(rows: Tensor, gram: Tensor, taps: int, counts: tuple[int, ...]) -> dict[int, Dropped]:
    """Return the weight without so many input channels, for each count.

    Args:
        rows: float64, shape (rows, channels x taps).
        gram: H, second moments of the input, float64 of shape (K, K).
        taps: weights of one input channel.
        counts: how many channels go, each below the number of channels.

    Raises:
        OptionError: a count that leaves no channel.
    """
    channels = rows.shape[1] // taps
    if max(counts, default=0) >= channels:
        raise OptionError(f"{max(counts)} of {channels} channels cannot go; leave at least one")
    damped = gram + DAMPING * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    inverse, left = torch.linalg.inv(damped), rows.clone()
    alive, gone, found = torch.ones(channels, dtype=torch.bool), list[int](), dict[int, Dropped]()
    while len(gone) < max(counts, default=0):
        blocks = torch.linalg.inv(_blocks(inverse, alive, taps))
        parts = left.reshape(len(rows), channels, taps)
        costs = torch.einsum("rct,ctu,rcu->c", parts, blocks, parts)
        worst = int(torch.where(alive, costs, torch.inf).argmin())
        place = slice(worst * taps, (worst + 1) * taps)
        carried = blocks[worst] @ inverse[place]
        left = left - left[:, place] @ carried
        inverse = inverse - inverse[:, place] @ carried
        left[:, place] = 0.0
        # Round-off must not bring a channel back that is gone.
        inverse[place], inverse[:, place] = 0.0, 0.0
        alive[worst] = False
        gone.append(worst)
        if len(gone) in counts:
            change = left - rows
            found[len(gone)] = Dropped(tuple(gone), left.clone(), float(((change @ gram) * change).sum()))
    return found


def _blocks(inverse: Tensor, alive: Tensor, taps: int) -> Tensor:
    """Return the block of each channel, shape (channels, taps, taps); 1 for channels that are gone."""
    channels = len(alive)
    blocks = inverse.reshape(channels, taps, channels, taps).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return torch.where(alive.reshape(-1, 1, 1), blocks, torch.eye(taps, dtype=inverse.dtype))
