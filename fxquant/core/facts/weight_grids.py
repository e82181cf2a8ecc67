"""The grids of weights at every candidate width, and weights rounded on them before there is a plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.ir import Grid
from fxquant.core.storage import read_arrays, tensor_digest, write_arrays


@dataclass(frozen=True)
class WeightGrids:
    """The grid of every site's weight at every candidate width.

    Args:
        grids: site name -> bits -> grid.
        rounded: (site name, bits) -> weight rounded on that grid better than to its nearest values; nearest rounding
            is meant where there is none.
    """

    grids: dict[str, dict[int, Grid]]
    rounded: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def at(self, site: str, bits: int) -> Grid:
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
        return tensor_digest({f"{site}:{bits}": tensor for (site, bits), tensor in self.rounded.items()})

    def save_rounded(self, path: Path) -> None:
        """Write the rounded weights as integers.

        Raises:
            OutputError: the folder cannot be written.
        """
        integers = {f"{site}:{bits}": self.at(site, bits).quantize(t) for (site, bits), t in self.rounded.items()}
        write_arrays(path, {key: q.to(torch.int8).cpu().numpy() for key, q in integers.items()})

    def with_rounded(self, path: Path) -> WeightGrids:
        """Return these grids with the rounded weights that `save_rounded` wrote.

        Raises:
            FileFormatError: missing, damaged, or of another network.
        """
        rounded = dict(self.rounded)
        for key, array in read_arrays(path).items():
            site, _, bits = key.rpartition(":")
            try:
                rounded[site, int(bits)] = self.grids[site][int(bits)].dequantize(torch.from_numpy(array))
            except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
                raise FileFormatError(
                    f"{path} does not belong to this model ({key}: {error}); quantize again"
                ) from error
        return replace(self, rounded=rounded)
