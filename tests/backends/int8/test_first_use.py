from __future__ import annotations

import copy

import torch

from fxquant.backends.int8 import OnFirstUse


def test_it_belongs_to_one_tensor_and_is_not_copied() -> None:
    weight = torch.ones(2)
    kept = OnFirstUse[str]()
    assert kept.of(weight) is None
    assert kept.keep(weight, "packed") == "packed"
    assert kept.of(weight) == "packed"
    assert kept.of(weight.clone()) is None
    assert copy.deepcopy(kept).of(weight) is None
    assert copy.copy(kept).of(weight) is None
