"""The integer grids of weights, and where fake-quant nodes stand in a simulated graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxquant.core.errors import OptionError
from fxquant.core.spec import QuantSpec


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
