"""QDrop: BRECQ under random dropping."""

from __future__ import annotations

from dataclasses import replace

import torch

from fxquant.core.facts import Rounding
from fxquant.passes.rounding import ROUNDERS
from fxquant.passes.rounding.learned import QDROP
from tests.passes.rounding.tasks import task_of


def test_half_of_everything_is_dropped_and_it_matters() -> None:
    assert (QDROP.inputs, QDROP.mix, QDROP.drop, QDROP.prediction) == ("mixed", 0.5, 0.5, 0.0)
    task = task_of("plain", 2)
    made = []
    for drop in (0.5, 0.0):
        asked = replace(task, overrides={"iterations": 5, "batch": 4, "drop": drop})
        found = ROUNDERS["qdrop"](replace(asked, store=task_of("plain", 2).store))[Rounding]
        assert [unit.sites for unit in found.units] == [("conv1",), ("conv2", "conv3"), ("fc",)]
        assert found.method == "qdrop"
        made.append(torch.stack([grid.scale for grid in found.activations.values()]))
    assert not torch.equal(*made)
