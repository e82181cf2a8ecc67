from __future__ import annotations

import pytest

from fxquant.backends import backend
from fxquant.core.facts import CostTable, Target
from fxquant.core.ir import FLOAT, Choice, Site, Sites
from fxquant.passes.cost import COSTS, site_bytes
from tests.programs import TARGET, calibrated, uniform
from tests.scoring import calibrated as for_reference

size = COSTS["size"]


W2, W3, W4, W5, W8 = (Choice(bits, 8) for bits in (2, 3, 4, 5, 8))
REFERENCE = backend("reference").target


def site(weights: int, channels: int, biases: int) -> Site:
    return Site("conv", "conv", "conv.weight", ("conv",), weights, channels, biases, 1, "x", (W2,))


@pytest.mark.parametrize(
    ("choice", "weights"), [(W2, 256), (W4, 512), (W8, 1024), (W3, 384), (W5, 640), (Choice(4, 4), 512)]
)
def test_weights_at_their_width_scales_and_biases(choice: Choice, weights: int) -> None:
    assert site_bytes(site(1024, 16, 16), choice, REFERENCE) == weights + 16 * 4 + 16 * 4
    assert site_bytes(site(1024, 16, 0), choice, REFERENCE) == weights + 16 * 4


@pytest.mark.parametrize(("choice", "weights"), [(W2, 7), (W4, 14), (W8, 27)])
def test_odd_counts_fill_the_last_byte(choice: Choice, weights: int) -> None:
    assert site_bytes(site(27, 3, 0), choice, REFERENCE) == weights + 12


def test_float_keeps_neither_scale_nor_zero_point() -> None:
    assert site_bytes(site(27, 3, 3), FLOAT, REFERENCE) == 4 * 30


def plan_bytes(name: str, bits: int) -> tuple[float, CostTable]:
    program = calibrated(name)
    table = size(program, TARGET)
    return table.of(uniform(program, bits)), table


def test_a_whole_network_by_hand() -> None:
    # conv1 27*8 weights (its bias comes from the batch norm), conv2 72*8, conv3 8*8, fc 8*5.
    weights, channels, biases = [216, 576, 64, 40], [8, 8, 8, 5], [8, 8, 8, 5]
    found, table = plan_bytes("residual", 4)
    by_hand = sum(-(-w // 2) for w in weights) + 4 * sum(channels) + 4 * sum(biases)
    grids = table.constant
    assert found - grids == by_hand
    assert table.float_cost == 4 * (sum(weights) + sum(biases))
    # Nothing stays in float, so the rest is one scale and one zero-point per activation.
    assert grids % 5 == 0
    assert 0 < grids <= 5 * 10


def test_what_stays_in_float_is_counted() -> None:
    _, table = plan_bytes("concat", 4)
    sites = calibrated("concat")
    grids = len({s.input_tie for s in sites[Sites].sites})
    # The batch norm behind the concatenation: weight, bias, mean and variance of 8 channels.
    assert table.constant - 4 * 8 * 4 >= 5 * grids
    assert (table.constant - 4 * 8 * 4) % 5 == 0


def test_a_weight_used_twice_is_stored_once() -> None:
    found, table = plan_bytes("shared", 8)
    convolution, linear = 4 * 4 * 9, 4 * 4
    linear_bias = 4 * calibrated("shared")[Sites].by_name("fc_b").bias_count
    assert found - table.constant == (convolution + 4 * 4 + 4 * 4) + (linear + 4 * 4 + linear_bias)
    assert [s.name for s in calibrated("shared")[Sites].sites] == ["conv", "fc_b"]


@pytest.mark.parametrize("name", ["residual", "concat", "shared", "tokens", "attention", "functional", "two_inputs"])
def test_more_bits_are_more_bytes_and_float_is_the_float_model(name: str) -> None:
    program = for_reference(name, (2, 4, 8, 32))
    table = size(program, REFERENCE)
    costs = [table.of(dict.fromkeys((s.name for s in program[Sites].sites), c)) for c in (W2, W4, W8)]
    assert costs == sorted(costs)
    assert len(set(costs)) == 3
    assert table.constant >= 0
    for each in program[Sites].sites:
        values = [v for c, v in zip(table.candidates, table.values, strict=True) if c.site == each.name]
        # Float may be less: one scale per channel is much for a channel of one weight.
        assert values[:-1] == sorted(values[:-1])
        assert values[-1] == 4 * (each.weight_count + each.bias_count)


def test_a_width_without_a_type_takes_the_next() -> None:
    wide = Target("wide", {"conv": "k"}, frozenset(), (2, 4), (8,), {2: 4, 4: 4})
    assert site_bytes(site(64, 1, 0), W2, wide) == site_bytes(site(64, 1, 0), W4, wide) == 32 + 4
