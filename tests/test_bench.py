from __future__ import annotations

import pytest

from fxquant.bench import bench, measure_speed
from fxquant.core.errors import OptionError
from tests.small import images, small_result


def test_float_and_mixed_with_their_spread() -> None:
    speeds = bench(small_result(), threads=1, rounds=3)
    assert [speed.name for speed in speeds] == ["float", "mixed", "uniform W4A8", "uniform W8A8"]
    for speed in speeds:
        assert 0 < speed.low <= speed.milliseconds <= speed.high


def test_a_uniform_plan_is_not_timed_twice() -> None:
    widest = small_result(budget=None)
    assert [speed.name for speed in bench(widest, threads=1, rounds=2)] == ["float", "mixed", "uniform W4A8"]


def test_any_graphs_in_any_target() -> None:
    graphs = {"a": small_result().program.module, "b": small_result().simulated}
    speeds = measure_speed(graphs, (images(2),), "onnxruntime", threads=1, rounds=2)
    assert [speed.name for speed in speeds] == ["a", "b"]


def test_one_round_has_no_spread() -> None:
    with pytest.raises(OptionError, match="rounds=1"):
        bench(small_result(), rounds=1)
    with pytest.raises(OptionError, match="unknown target"):
        measure_speed({}, (), "tpu")
