from __future__ import annotations

import pytest
import torch

from fxquant.core.errors import OptionError
from fxquant.core.facts import WeightGrids
from fxquant.core.ir import Grid, WeightFormat, weight_spec

GRID = Grid(weight_spec(4), torch.ones(3), torch.zeros(3, dtype=torch.int32))
GRIDS = WeightGrids({"conv": {WeightFormat(4): GRID, WeightFormat(8): GRID}, "fc": {WeightFormat(4): GRID}})


def test_a_grid_by_site_and_width() -> None:
    assert GRIDS.at("conv", WeightFormat(4)) is GRID


def test_an_unknown_site_lists_the_known() -> None:
    with pytest.raises(OptionError, match="no site is called 'cnv'; sites: conv, fc"):
        GRIDS.at("cnv", WeightFormat(4))


def test_a_width_that_was_no_candidate() -> None:
    with pytest.raises(OptionError, match=r"site 'conv' has no 3c-bit grid; candidate formats are 4, 8"):
        GRIDS.at("conv", WeightFormat(3, "codebook"))
