from __future__ import annotations

import pytest
import torch

from fxquant.core.errors import OptionError
from fxquant.core.grids import WeightGrid, WeightGrids
from fxquant.core.spec import weight_spec

GRID = WeightGrid(weight_spec(4), torch.ones(3), torch.zeros(3, dtype=torch.int32))


def test_grids_are_found_by_site_and_width() -> None:
    grids = WeightGrids({"fc": {4: GRID}})
    assert grids.at("fc", 4) is GRID
    with pytest.raises(OptionError, match="no site is called 'conv'; sites: fc"):
        grids.at("conv", 4)
    with pytest.raises(OptionError, match=r"'fc' has no 3-bit grid; candidate widths are \[4\]"):
        grids.at("fc", 3)
