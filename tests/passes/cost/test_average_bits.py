from __future__ import annotations

from dataclasses import replace

import pytest

from fxquant.core.facts import Target
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


def test_a_codebook_counts_with_its_tables() -> None:
    program = for_reference("plain", ("2c", 8))
    table = average_bits(program, program[Target])
    sites = program[Sites].sites
    plan = {site.name: Choice(2, 8, "codebook") for site in sites}
    # A table of int8 levels for the layer at least; more tables only where they are worth their bits.
    least = sum(2 * site.weight_count + 8 * 3 for site in sites) / sum(site.weight_count for site in sites)
    assert least < table.of(plan) < 8
