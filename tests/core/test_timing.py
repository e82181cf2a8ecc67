from __future__ import annotations

import time

from fxquant.core.timing import time_interleaved


def test_the_slower_one_takes_longer_and_each_round_runs_both() -> None:
    calls = {"fast": 0, "slow": 0}

    def fast() -> None:
        calls["fast"] += 1

    def slow() -> None:
        calls["slow"] += 1
        time.sleep(0.004)

    quick, late = time_interleaved([fast, slow], rounds=3)
    assert quick < 1.0 < 4.0 <= late
    assert calls["slow"] == 2 + 3
    assert calls["fast"] > calls["slow"]
