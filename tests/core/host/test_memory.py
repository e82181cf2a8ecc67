from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fxquant.core.errors import MemoryLimitError
from fxquant.core.host import give_back, is_shortage, memory_named

HUGE = 1 << 60


def by_numpy() -> None:
    np.zeros(HUGE, dtype=np.int8)


def by_torch() -> None:
    torch.empty(HUGE, dtype=torch.int8)


def by_python() -> None:
    bytes(HUGE)


@pytest.mark.parametrize("ask", [by_numpy, by_torch, by_python])
def test_every_kind_of_shortage_names_stage_and_advice(ask: Callable[[], None]) -> None:
    pattern = r"score needs more memory than there is \(.+\); give less"
    with pytest.raises(MemoryLimitError, match=pattern), memory_named("score", "give less"):
        ask()


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_named("score", "give less"):
        raise RuntimeError("shapes do not fit")
    assert not is_shortage(ValueError("out of memory"))


def test_freed_memory_goes_back_to_the_system() -> None:
    """What lies below a block that is still in use stays with the process otherwise."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("the system does not tell what a process holds")
    held = [torch.ones(30_000) for _ in range(2000)]
    last = torch.ones(30_000)
    before = resident()
    del held
    give_back()
    assert last.numel() == 30_000
    assert resident() < before - 100 * 10**6


def resident() -> int:
    """Return the bytes that the process holds."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024
