"""The grids of weights in every candidate format, and weights rounded on them before there is a plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.ir import Grid, WeightFormat
from fxquant.core.storage import read_arrays, text_digest, write_arrays


@dataclass(frozen=True)
class WeightGrids:
    """The grid of every site's weight in every candidate format.

    Args:
        grids: site name -> format -> grid.
        rounded: (site name, format) -> weight rounded on that grid better than to its nearest values; nearest rounding
            is meant where there is none.
    """

    grids: dict[str, dict[WeightFormat, Grid]]
    rounded: dict[tuple[str, WeightFormat], Tensor] = field(default_factory=dict)

    def at(self, site: str, weight: WeightFormat) -> Grid:
        """Return the grid of a site in a format.

        Raises:
            OptionError: the format was not a candidate, or there is no such site.
        """
        grids = self.grids.get(site)
        if grids is None:
            raise OptionError(f"no site is called {site!r}; sites: {', '.join(self.grids)}")
        if weight not in grids:
            known = ", ".join(each.label for each in sorted(grids))
            raise OptionError(f"site {site!r} has no {weight.label}-bit grid; candidate formats are {known}")
        return grids[weight]

    def digest(self) -> str:
        """Return a digest of what is rounded better than to nearest, the same wherever model and images are.

        The weights themselves would differ in a step between machines that sum in another order.
        """
        return text_digest(str(sorted((site, weight.label) for site, weight in self.rounded)))

    def save_rounded(self, path: Path) -> None:
        """Write the rounded weights as integers, with the grids they lie on.

        Raises:
            OutputError: the folder cannot be written.
        """
        arrays = {}
        for (site, weight), tensor in self.rounded.items():
            grid, key = self.at(site, weight), f"{site}:{weight.label}"
            arrays[f"q:{key}"] = grid.quantize(tensor).to(torch.int8).cpu().numpy()
            arrays[f"scale:{key}"] = grid.scale.cpu().numpy()
            if grid.levels is not None:
                arrays[f"levels:{key}"] = grid.levels.cpu().numpy()
        write_arrays(path, arrays)

    def with_rounded(self, path: Path) -> WeightGrids:
        """Return these grids with the rounded weights that `save_rounded` wrote.

        Raises:
            FileFormatError: missing, damaged, or of another network.
        """
        rounded, grids = dict(self.rounded), {site: dict(known) for site, known in self.grids.items()}
        arrays = read_arrays(path)
        for key, array in arrays.items():
            kind, _, place = key.partition(":")
            site, _, label = place.rpartition(":")
            if kind != "q":
                continue
            try:
                weight, levels = WeightFormat.parse(label), arrays.get(f"levels:{place}")
                grid = replace(
                    grids[site][weight],
                    scale=torch.from_numpy(arrays[f"scale:{place}"]),
                    levels=None if levels is None else torch.from_numpy(levels),
                )
                grids[site][weight], q = grid, torch.from_numpy(array)
                rounded[site, weight] = grid.dequantize(q)
            except (KeyError, ValueError, TypeError, IndexError, RuntimeError, OptionError) as error:
                raise FileFormatError(
                    f"{path} does not belong to this model ({key}: {error}); quantize again"
                ) from error
        return WeightGrids(grids, rounded)
