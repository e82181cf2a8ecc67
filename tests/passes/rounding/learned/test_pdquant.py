"""PD-Quant and its kin: the names under which they are kept, and what sets each apart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxquant.core.errors import CalibrationError
from fxquant.core.facts import Rounding
from fxquant.passes.rounding import ROUNDERS
from fxquant.passes.rounding.learned import SECOND_STAGE
from tests.passes.rounding.tasks import images, task_of

SHORT: dict[str, object] = {"iterations": 4, "batch": 4}


@pytest.mark.parametrize("name", ["pdquant", "fast", "vit"])
def test_each_is_kept_under_its_name(name: str) -> None:
    task = replace(task_of("plain", 4), overrides={**SHORT, "correction": 0})
    found = ROUNDERS[name](task)[Rounding]
    assert found.method == name
    assert {unit.method for unit in found.units} == {name}
    # Straight-through weights learn their grids, rounding directions do not.
    assert bool(found.grids) == (name != "pdquant")


def test_lowbit_ends_with_the_whole_network() -> None:
    task = replace(task_of("plain", 2, held_out=images("plain", 6)), overrides={**SHORT, "correction": 0})
    found = ROUNDERS["lowbit"](task)[Rounding]
    assert found.method == "pdquant+network"
    *units, last = found.units
    assert [unit.method for unit in units] == ["pdquant"] * 3
    assert (last.method, last.sites) == ("network", ("conv1", "conv2", "conv3", "fc"))
    # It starts where the first stage ended; only the steps' float32 products differ.
    realised = units[-1].after if units[-1].kept else units[-1].before
    assert last.before == pytest.approx(realised, rel=1e-3)
    assert SECOND_STAGE.feature > 0


def test_the_faithful_profile_is_asymmetric_and_refuses_networks_without_normalisation() -> None:
    short: dict[str, object] = {**SHORT, "correction": 2}
    found = ROUNDERS["pdquant-faithful"](replace(task_of("residual", 4), overrides=short))[Rounding]
    assert not any(grid.spec.symmetric for grid in found.grids.values())
    assert set(found.grids) == set(found.weights)
    with pytest.raises(CalibrationError, match="batch normalisation"):
        ROUNDERS["pdquant-faithful"](replace(task_of("plain", 4), overrides=short))
