from __future__ import annotations

import pytest

from fxquant.core.ir import FLOAT, Choice, Sites
from fxquant.passes.cost import COSTS
from tests.programs import TARGET, calibrated
from tests.scoring import calibrated as for_reference

bops = COSTS["bops"]
MACS = {"conv1": 8 * 27 * 64, "conv2": 8 * 72 * 64, "conv3": 8 * 8 * 64, "fc": 8 * 5}


def test_one_network_by_hand() -> None:
    program = calibrated("residual")
    table = bops(program, TARGET)
    assert table.float_cost == sum(MACS.values()) * 32 * 32
    assert table.constant == 0
    plan = {"conv1": Choice(8, 8), "conv2": Choice(2, 8), "conv3": Choice(4, 8), "fc": Choice(8, 8)}
    by_hand = MACS["conv1"] * 64 + MACS["conv2"] * 16 + MACS["conv3"] * 32 + MACS["fc"] * 64
    assert table.of(plan) == by_hand


def test_activation_bits_and_float_count() -> None:
    program = for_reference("plain", (4, 8, 32), (4, 8))
    table = bops(program, TARGET)
    for site in program[Sites].sites:
        by_choice = {c.choice: v for c, v in zip(table.candidates, table.values, strict=True) if c.site == site.name}
        assert by_choice[Choice(4, 4)] * 2 == by_choice[Choice(4, 8)] == by_choice[Choice(8, 4)]
        assert by_choice[FLOAT] == site.macs * 1024
    everything = dict.fromkeys((s.name for s in program[Sites].sites), FLOAT)
    assert table.of(everything) == pytest.approx(table.float_cost)


def test_a_convolution_used_twice_works_twice() -> None:
    site = calibrated("shared")[Sites].by_name("conv")
    assert len(site.nodes) == 2
    assert site.macs == 2 * 4 * 4 * 9 * 36
