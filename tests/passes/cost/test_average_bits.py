from __future__ import annotations

from dataclasses import replace

import pytest

from fxquant.core.ir import FLOAT, Choice, Sites
from fxquant.passes.cost import COSTS
from tests.programs import TARGET, calibrated
from tests.scoring import calibrated as for_reference

average_bits = COSTS["average_bits"]


def test_stem_and_classifier_count() -> None:
    program = calibrated("residual")
    table = average_bits(program, TARGET)
    plan = {"conv1": Choice(8, 8), "conv2": Choice(2, 8), "conv3": Choice(4, 8), "fc": Choice(8, 8)}
    by_hand = (216 * 8 + 576 * 2 + 64 * 4 + 40 * 8) / (216 + 576 + 64 + 40)
    assert table.of(plan) == pytest.approx(by_hand, rel=1e-12)


def test_a_width_counts_as_it_is_stored_where_anything_is_packed() -> None:
    plan = {**dict.fromkeys(("conv1", "conv2", "conv3"), Choice(8, 8)), "fc": Choice(4, 8)}
    packed = replace(TARGET, storage_bits={**TARGET.storage_bits, 4: 8})
    assert average_bits(calibrated("residual"), packed).of(plan) == pytest.approx(8)
    whole = replace(TARGET, storage_bits=dict.fromkeys(TARGET.storage_bits, 8))
    assert average_bits(calibrated("residual"), whole).of(plan) == pytest.approx(8 - 4 * 40 / 896)


def test_float_counts_32() -> None:
    program = for_reference("plain", (4, 8, 32), (4, 8))
    table = average_bits(program, TARGET)
    assert table.of(dict.fromkeys((s.name for s in program[Sites].sites), FLOAT)) == pytest.approx(32)
    assert table.float_cost == 32
