"""The table of profiles: units, records and steps of each, and what sets them apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxquant.core.facts import Rounding
from fxquant.passes.rounding import ROUNDERS
from tests.passes.rounding.tasks import images, task_of

SHORT: dict[str, object] = {"iterations": 4, "batch": 4}
LAYERS = [("conv1",), ("conv2",), ("conv3",), ("fc",)]
BLOCKS = [("conv1",), ("conv2", "conv3"), ("fc",)]

TABLE = {
    "adaround": (LAYERS, False, False),
    "brecq": (BLOCKS, True, False),
    "qdrop": (BLOCKS, True, False),
    "pdquant": (BLOCKS, True, False),
    "fast": (BLOCKS, True, True),
    "vit": (BLOCKS, True, True),
}
"""Name -> sites of each unit, whether activation steps are learned, whether weight scales are."""


def rounded(name: str, network: str = "plain", bits: int = 4, **changes: object) -> Rounding:
    task = replace(task_of(network, bits), overrides={**SHORT, "correction": 0, **changes})
    return ROUNDERS[name](task)[Rounding]


@pytest.mark.parametrize(("name", "units", "steps", "scales"), [(name, *row) for name, row in TABLE.items()])
def test_what_is_tuned_together_and_what_is_learned(
    name: str, units: list[tuple[str, ...]], steps: bool, scales: bool
) -> None:
    found, module = rounded(name), task_of("plain", 4).simulated().module
    assert found.method == name
    assert {unit.method for unit in found.units} == {name}
    assert [unit.sites for unit in found.units] == units
    moved = [grid.scale != module.get_submodule(f"quantize_{g}").scale for g, grid in found.activations.items()]
    assert any(moved) is steps
    assert bool(found.grids) is scales


def test_dropping_matters() -> None:
    one, other = (
        torch.stack([grid.scale for grid in rounded("qdrop", bits=2, drop=drop).activations.values()])
        for drop in (0.5, 0.0)
    )
    assert not torch.equal(one, other)


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


def test_the_faithful_profile_has_asymmetric_grids() -> None:
    found = rounded("pdquant-faithful", "residual", correction=2)
    assert not any(grid.spec.symmetric for grid in found.grids.values())
    assert set(found.grids) == set(found.weights)
    assert not found.notes
