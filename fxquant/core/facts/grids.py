"""The integer grids of weights, and where fake-quant nodes stand in a simulated graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.ir import QuantSpec, dequantize, quantize
from fxquant.core.storage import read_arrays, tensor_digest, write_arrays


@dataclass(frozen=True)
class WeightGrid:
    """One site's weight grid at one width.

    Args:
        spec: the grid.
        scale: float32, shape `(channels,)`.
        zero_point: int32, shape `(channels,)`; zeros on a symmetric grid.
        rounded: the weight rounded to the grid better than to its nearest values; None where nearest is meant.
    """

    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor
    rounded: Tensor | None = None


@dataclass(frozen=True)
class WeightGrids:
    """Site name -> bits -> grid."""

    grids: dict[str, dict[int, WeightGrid]]

    def at(self, site: str, bits: int) -> WeightGrid:
        """Return the grid of a site at a width.

        Raises:
            OptionError: the width was not a candidate, or there is no such site.
        """
        grids = self.grids.get(site)
        if grids is None:
            raise OptionError(f"no site is called {site!r}; sites: {', '.join(self.grids)}")
        if bits not in grids:
            raise OptionError(f"site {site!r} has no {bits}-bit grid; candidate widths are {sorted(grids)}")
        return grids[bits]

    def digest(self) -> str:
        """Return a digest of the rounded weights, the same for all grids that round to nearest."""
        known = self._rounded()
        return tensor_digest({f"{site}:{bits}": tensor for (site, bits), tensor in known.items()})

    def save_rounded(self, path: Path) -> None:
        """Write the rounded weights as integers.

        Raises:
            OutputError: the folder cannot be written.
        """
        arrays = {}
        for (site, bits), tensor in self._rounded().items():
            grid = self.grids[site][bits]
            q = quantize(tensor, grid.scale, grid.zero_point, grid.spec)
            arrays[f"{site}:{bits}"] = q.to(torch.int8).cpu().numpy()
        write_arrays(path, arrays)

    def with_rounded(self, path: Path) -> WeightGrids:
        """Return these grids with the rounded weights that `save_rounded` wrote.

        Raises:
            FileFormatError: missing, damaged, or of another network.
        """
        grids = {site: dict(widths) for site, widths in self.grids.items()}
        for key, array in read_arrays(path).items():
            site, _, bits = key.rpartition(":")
            try:
                grid = grids[site][int(bits)]
                tensor = dequantize(torch.from_numpy(array), grid.scale, grid.zero_point, grid.spec)
            except (KeyError, ValueError, TypeError, RuntimeError) as error:
                raise FileFormatError(
                    f"{path} does not belong to this model ({key}: {error}); quantize again"
                ) from error
            grids[site][int(bits)] = replace(grid, rounded=tensor)
        return WeightGrids(grids)

    def _rounded(self) -> dict[tuple[str, int], Tensor]:
        found = {(site, bits): grid.rounded for site, widths in self.grids.items() for bits, grid in widths.items()}
        return {key: tensor for key, tensor in found.items() if tensor is not None}


@dataclass(frozen=True)
class FakeQuantNodes:
    """Where the quantizers of a simulated graph stand.

    Args:
        weights: site name -> names of the fake-quant nodes on its weight.
        activations: group name -> names of the fake-quant nodes on its values.
        inputs: site name -> names of the fake-quant nodes its ops read their activation from.
    """

    weights: dict[str, tuple[str, ...]]
    activations: dict[str, tuple[str, ...]]
    inputs: dict[str, tuple[str, ...]]
