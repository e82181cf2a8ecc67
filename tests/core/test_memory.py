from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fxquant.core.errors import MemoryLimitError
from fxquant.core.memory import is_shortage, memory_named

HUGE = 1 << 60


def by_numpy() -> None:
    np.zeros(HUGE, dtype=np.int8)


def by_torch() -> None:
    torch.empty(HUGE, dtype=torch.int8)


def by_python() -> None:
    bytes(HUGE)


@pytest.mark.parametrize("ask", [by_numpy, by_torch, by_python])
def test_every_kind_of_shortage_names_stage_and_advice(ask: Callable[[], None]) -> None:
    told = r"score needs more memory than there is \(.+\); give less"
    with pytest.raises(MemoryLimitError, match=told), memory_named("score", "give less"):
        ask()


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_named("score", "give less"):
        raise RuntimeError("shapes do not fit")
    assert not is_shortage(ValueError("out of memory"))
