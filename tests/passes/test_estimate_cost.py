from __future__ import annotations

import pytest

from fxquant.core.facts import CostTables
from fxquant.core.ir import FLOAT, Choice, EdgeGroups, Sites
from fxquant.passes import EstimateCost, FindSites
from tests.programs import TARGET, check_pass, folded, tied, uniform


def tables(name: str, bits: tuple[int, ...] = (2, 4, 8, 32)) -> CostTables:
    program = FindSites(TARGET, bits=bits, activation_bits=(8,))(tied(name))
    return check_pass(EstimateCost(TARGET), program)[CostTables]


def sites(name: str) -> Sites:
    return FindSites(TARGET, bits=(2, 4, 8), activation_bits=(8,))(tied(name))[Sites]


@pytest.mark.parametrize("name", ["residual", "separable", "two_inputs", "sequence", "name_clash"])
def test_the_float_model_costs_its_parameters(name: str) -> None:
    table = tables(name)["size"]
    parameters = sum(p.numel() for p in folded(name).module.parameters())
    assert table.float_cost == 4 * parameters
    program = FindSites(TARGET, bits=(4,), activation_bits=(8,))(tied(name))
    plan = dict.fromkeys(uniform(program, 4), FLOAT)
    activations = 5 * len(program[EdgeGroups].producers)
    assert table.of(plan) == 4 * parameters + activations


def test_a_table_that_an_embedding_reads_too_is_stored_once() -> None:
    table = tables("tokens")["size"]
    plan = uniform(FindSites(TARGET, bits=(8,), activation_bits=(8,))(tied("tokens")), 8)
    # fc 36 + 6 scales + 6 biases, out 66 + 11 scales, 2 activation grids
    assert table.of(plan) == (36 + 6 * 4 + 6 * 4) + (66 + 11 * 4) + 2 * 5


@pytest.mark.parametrize("name", ["residual", "shared", "attention"])
def test_average_bits_and_bit_operations_of_uniform_plans(name: str) -> None:
    costs = tables(name)
    assert sorted(costs.tables) == ["activation", "average_bits", "bops", "size"]
    for bits in (2, 4, 8):
        plan = dict.fromkeys((site.name for site in sites(name).sites), Choice(bits, 8))
        assert costs["average_bits"].of(plan) == pytest.approx(bits)
        assert costs["bops"].of(plan) / costs["bops"].float_cost == pytest.approx(bits * 8 / 1024)
    macs = sum(site.macs for site in sites(name).sites)
    assert costs["bops"].float_cost == macs * 1024
