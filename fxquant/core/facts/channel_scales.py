"""The factors of equalized channels, by the parameters that they multiply or divide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fxquant.core.errors import CalibrationError, FileFormatError
from fxquant.core.storage import read_arrays, write_arrays


@dataclass(frozen=True)
class ChannelScales:
    """Factors of channels: a parameter p is replaced by `p * multiplied / divided`.

    Args:
        multiplied: attribute path of a parameter -> factors of the values that it makes, float64, of its number of axes
            and of a shape that broadcasts to its own, above 0.
        divided: attribute path of a weight -> factors of the values that it reads, likewise.

    Raises:
        CalibrationError: a factor is not finite, or not above 0.
    """

    multiplied: Mapping[str, Tensor] = field(default_factory=dict)
    divided: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path, factor in (*self.multiplied.items(), *self.divided.items()):
            if not bool((torch.isfinite(factor) & (factor > 0)).all()):
                raise CalibrationError(f"channel scales of {path!r} are not all finite and above 0; quantize again")

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameters that change."""
        return tuple(dict.fromkeys((*self.multiplied, *self.divided)))

    def power(self, share: float) -> ChannelScales:
        """Return every factor to this power: 0 leaves the network as it is, 1 gives the same factors."""
        return ChannelScales(
            *({path: factor**share for path, factor in part.items()} for part in (self.multiplied, self.divided))
        )

    def of(self, path: str, parameter: Tensor) -> Tensor:
        """Return a parameter as it is with its channels scaled, of its type.

        Raises:
            FileFormatError: the factors are those of a parameter of another shape.
        """
        value = parameter.detach().double()
        try:
            if path in self.multiplied:
                value = value * self.multiplied[path].to(value.device)
            if path in self.divided:
                value = value / self.divided[path].to(value.device)
            return value.to(parameter.dtype).expand(parameter.shape).contiguous()
        except RuntimeError as error:
            shape = tuple(parameter.shape)
            raise FileFormatError(
                f"channel_scales.npz belongs to another model: factors of {path!r} do not fit its shape {shape}; "
                "quantize again"
            ) from error

    def save(self, path: Path) -> None:
        """Write what `load` reads, as npz.

        Raises:
            OutputError: the path cannot be written.
        """
        parts = {"multiplied": self.multiplied, "divided": self.divided}
        write_arrays(path, {f"{part}:{name}": factor.numpy() for part in parts for name, factor in parts[part].items()})

    @staticmethod
    def load(path: Path) -> ChannelScales:
        """Read what `save` wrote.

        Raises:
            FileFormatError: missing, damaged, or a factor that is no positive number.
        """
        found: dict[str, dict[str, Tensor]] = {"multiplied": {}, "divided": {}}
        for key, array in read_arrays(path).items():
            part, _, name = key.partition(":")
            if part not in found or not name or not np.issubdtype(array.dtype, np.floating):
                raise FileFormatError(f"{path} is not an intact file of channel scales ({key!r}); quantize again")
            found[part][name] = torch.from_numpy(array.astype(np.float64))
        try:
            return ChannelScales(**found)
        except CalibrationError as error:
            raise FileFormatError(f"{path} is not an intact file: {error}") from error
