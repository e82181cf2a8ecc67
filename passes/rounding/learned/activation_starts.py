"""Activation grids found again for each unit, on the values that the quantized network in front of it gives.

PD-Quant's code (section 4 of arXiv 2212.07048 leaves it out): just before a unit is tuned, its weights rounded to
nearest, each of its activation quantizers gets the grid of least `mean |x - round_trip(x)|^2.4` on the first 256
images, in graph order, so that each sees what those before it have rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from fxquant.core.ir import Grid
from fxquant.passes.rounding.learned.asymmetric import asymmetric_grid

START_IMAGES = 256
"""Images that grids are found on."""
SAMPLES = 1 << 16
"""Most values of them that are looked at, evenly spaced."""


def activation_starts(
    known: Mapping[str, Grid], values: Callable[[str, Mapping[str, Grid]], Tensor]
) -> dict[str, Grid]:
    """Return group -> grid of least rounding error, with the width of the one it had.

    Args:
        known: group -> its grid from calibration, in the order in which the groups are computed.
        values: (group, grids found so far) -> the group's values before they are rounded, of any shape.
    """
    found: dict[str, Grid] = {}
    for group, grid in known.items():
        found[group] = _best(values(group, found).flatten().float(), grid)
    return found


def _best(values: Tensor, grid: Grid) -> Grid:
    few = values[:: -(-len(values) // SAMPLES)].reshape(1, -1)
    searched = asymmetric_grid(few, replace(grid.spec, channel_axis=0))
    return Grid(grid.spec, searched.scale[0], searched.zero_point[0])
