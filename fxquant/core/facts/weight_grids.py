"""The grids of weights in every candidate format, and weights rounded on them before there is a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.ir import MAX_BITS, Grid, WeightFormat, weight_spec
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

    def with_rounded(self, path: Path, axes: Mapping[str, int] = MappingProxyType({})) -> WeightGrids:
        """Return these grids with the rounded weights that `save_rounded` wrote.

        Args:
            path: the file.
            axes: site -> axis of its weight that counts channels; for sites whose grids are only in the file.

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
                weight, stored = WeightFormat.parse(label), arrays.get(f"levels:{place}")
                scale, levels = torch.from_numpy(arrays[f"scale:{place}"]), None
                if stored is not None:
                    levels = torch.from_numpy(stored)
                if weight in grids.get(site, {}):
                    grid = replace(grids[site][weight], scale=scale, levels=levels)
                else:
                    spec = weight_spec(int(weight.bits) if levels is None else MAX_BITS, axes[site])
                    spec = spec if scale.dim() else replace(spec, channel_axis=None)
                    grid = Grid(spec, scale, torch.zeros_like(scale, dtype=torch.int32), levels)
                grids.setdefault(site, {})[weight], q = grid, torch.from_numpy(array)
                rounded[site, weight] = grid.dequantize(q)
            except (KeyError, ValueError, TypeError, IndexError, RuntimeError, OptionError) as error:
                raise FileFormatError(
                    f"{path} does not belong to this model ({key}: {error}); quantize again"
                ) from error
        return WeightGrids(grids, rounded)
