"""What is decided for a network's weights, biases and activation steps, and the modules that hold it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor, nn

from fxquant.core.storage import Arrays


class DecidedWeight(nn.Module):
    """Returns a decided weight.

    Args:
        value: float32 on its grid.
    """

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the decided weight in place of the one passed."""
        del weight
        return self.value


class DecidedBias(nn.Module):
    """Returns a decided bias.

    Args:
        value: float32, shape (channels,).
    """

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self) -> Tensor:
        """Return the decided bias."""
        return self.value


@dataclass(frozen=True)
class Outcome:
    """Decided tensors.

    Args:
        weights: site name -> weight on its grid.
        scales: site name -> learned scale of that grid, shape (channels,).
        steps: group name -> scale of its values, shape ().
        levels: site name -> learned levels of its grid, int8 of shape (channels, L), where they are not evenly spaced.
        biases: op name -> bias that replaces the model's own, shape (channels,).
        zero_points: group name -> zero-point of its values where it is not the calibrated one, int32 of shape ().
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, Tensor] = field(default_factory=dict)
    levels: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    zero_points: dict[str, Tensor] = field(default_factory=dict)

    def joined(self, other: Outcome) -> Outcome:
        """Return both merged; `other` wins."""
        return Outcome(*(getattr(self, kind) | getattr(other, kind) for kind in KINDS))

    @property
    def finite(self) -> bool:
        """Whether every number is finite and every scale above 0."""
        tensors = [*self.weights.values(), *self.scales.values(), *self.steps.values(), *self.biases.values()]
        positive = all(bool((t > 0).all()) for t in (*self.scales.values(), *self.steps.values()))
        return positive and all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

    def arrays(self) -> Arrays:
        """Return the tensors as named arrays."""
        kinds = {kind: getattr(self, kind) for kind in KINDS}
        return {f"{k}:{name}": t.detach().cpu().numpy() for k, held in kinds.items() for name, t in held.items()}

    @staticmethod
    def from_arrays(arrays: Arrays, device: torch.device) -> Outcome:
        """Read what `arrays` returned; arrays of other names are ignored."""
        held: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        for key, array in arrays.items():
            kind, colon, name = key.partition(":")
            if colon and kind in held:
                held[kind][name] = torch.from_numpy(np.array(array)).to(device)
        return Outcome(**held)


KINDS = tuple(each.name for each in fields(Outcome))
