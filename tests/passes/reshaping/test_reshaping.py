"""Splitting and leaving out channels: formulas by hand, the program against all plans, graphs before and after."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import flow
from fxquant.core.errors import InfeasibleBudgetError, OptionError
from fxquant.core.facts import CostTables, Settings, Target
from fxquant.core.ir import Choice, Program, RowGrid, Sites, fork, put_tensor, weight_spec
from fxquant.core.run import CalibrationSet
from fxquant.passes import EstimateCost
from fxquant.passes.reshaping import (
    Layer,
    Pair,
    Variant,
    chosen_shapes,
    drop_channels,
    halves,
    layers_of,
    pairs_of,
    reshaped,
    saved_by_splitting,
    split_channels,
    variants_of,
)

W3, W4 = Choice(3, 8), Choice(4, 8)


class Chain(nn.Module):
    """Three convolutions in a row, a residual sum and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        y = y + self.second(torch.relu(self.first(y)))
        scores: Tensor = self.head(y.mean(dim=(2, 3)))
        return scores


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(3))


def chain() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Chain().eval()


@pytest.fixture(scope="module")
def program() -> Program:
    settings = Settings(bits=(3, 4), target="onnxruntime")
    found = flow.find_sites(fxquant.capture(chain(), images()), settings)
    return flow.run(found, EstimateCost(found[Target]))


@pytest.fixture(scope="module")
def layers(program: Program) -> dict[str, Layer]:
    found = layers_of(program, CalibrationSet((images(),)))
    return {name: layer for name, layer in found.items() if isinstance(layer, Layer)}


def test_halves_add_up_and_round_like_the_whole() -> None:
    weight, step = torch.linspace(-1, 1, 41, dtype=torch.float64), torch.tensor(0.15, dtype=torch.float64)
    first, second = halves(weight, step)
    assert torch.equal(first + second, weight)
    grid = [torch.round(each / step) for each in (weight, first, second)]
    assert torch.equal(grid[1] + grid[2], grid[0])
    # Plain halves do not: both are rounded the same way.
    plain = [torch.round(each / step) for each in halves(weight, None)]
    assert not torch.equal(plain[0] + plain[1], grid[0])
    assert torch.equal(plain[0], plain[1])


def test_what_splitting_saves_by_hand() -> None:
    # Levels -2..1 of step 1: 3 is cut to 1, with twice the range to 2; -3 to -2, or -3; the others fit.
    grid = RowGrid(weight_spec(2), torch.ones(1, 1, 1).double(), torch.zeros(1, 1, 1).double())
    rows = torch.tensor([[[3.0, 0.4, -3.0, 1.0]]], dtype=torch.float64)
    power = torch.tensor([[[1.0, 1.0, 10.0, 1.0]]], dtype=torch.float64)
    assert saved_by_splitting(rows, grid, power, 1).tolist() == [4.0 - 1.0, 0.0, 10.0, 0.0]
    assert saved_by_splitting(rows, grid, power, 2).tolist() == [3.0, 10.0]


def test_a_split_layer_computes_the_same() -> None:
    layer = nn.Conv2d(4, 3, 3, bias=False).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    weight = split_channels(layer.weight.detach(), (1, 3), torch.tensor([0.1, 0.2, 0.3]))
    assert weight.shape == (3, 6, 3, 3)
    again = nn.functional.conv2d(torch.cat([x, x[:, [1, 3]]], dim=1), weight)
    assert float((again - layer(x).detach()).abs().max()) < 1e-12


def test_dropped_channels_are_made_up_for_by_least_squares() -> None:
    draws = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 8, generator=draws).double() @ torch.randn(8, 8, generator=draws).double()
    rows, gram = torch.randn(3, 8, generator=draws).double(), inputs.T @ inputs
    found = drop_channels(rows, gram, 2, (1, 2))
    costs = []
    for channel in range(4):
        kept = [c for c in range(8) if c // 2 != channel]
        target = inputs @ rows.T
        best = torch.linalg.lstsq(inputs[:, kept], target).solution
        costs.append(float((inputs[:, kept] @ best - target).square().sum()))
        if found[1].channels == (channel,):
            assert torch.allclose(found[1].rows[:, kept], best.T, atol=0.02)
            assert bool((found[1].rows.reshape(3, 4, 2)[:, channel] == 0).all())
            assert found[1].cost == pytest.approx(costs[-1], rel=0.01)
    assert found[1].channels == (int(torch.tensor(costs).argmin()),)
    assert found[2].channels[:1] == found[1].channels
    with pytest.raises(OptionError, match="leave at least one"):
        drop_channels(rows, gram, 2, (4,))


def test_an_unused_input_goes_first_and_costs_nothing() -> None:
    gram = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    dropped = drop_channels(torch.ones(2, 3, dtype=torch.float64), gram, 1, (1,))[1]
    assert dropped.channels == (1,)
    assert dropped.cost == pytest.approx(0.0, abs=1e-12)


def test_pairs_are_private_and_layers_whole(program: Program, layers: dict[str, Layer]) -> None:
    pairs = pairs_of(program, dict(layers), CalibrationSet((images(),)))
    # The stem's output is added to the second's, the second's is a term of a sum.
    assert [(pair.producer, pair.consumer) for pair in pairs] == [("first", "second")]
    assert pairs[0].made == tuple(range(8))
    assert (layers["second"].channels, layers["second"].taps) == (8, 9)


def test_variants_have_their_ratios_and_real_factors(layers: dict[str, Layer]) -> None:
    found = variants_of(layers["second"], (W3, W4), (0.05, 0.25), (0.5,), True)
    assert [(v.choice.label, len(v.split), len(v.dropped)) for v in found] == [
        *[("W3A8", 0, 0), ("W3A8", 2, 0), ("W3A8", 0, 4)],
        *[("W4A8", 0, 0), ("W4A8", 2, 0), ("W4A8", 0, 4)],
    ]
    assert [v.factor for v in found] == [1, 1.25, 0.5] * 2
    weight = layers["second"].weight
    whole, split, fewer = (each.effective for each in found[:3])
    assert whole is not None
    assert split is not None
    assert fewer is not None
    assert bool((fewer[:, list(found[2].dropped)] == 0).all())
    # The gram weighs what the rounder aims for, and more range loses no more.
    gram = layers["second"].gram
    errors = [float(((d := (e - weight).double().flatten(1)) @ gram * d).sum()) for e in (whole, split)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("seed", range(6))
def test_the_program_is_the_best_of_all_plans(program: Program, seed: int) -> None:
    names = [site.name for site in program[Sites].sites]
    pair = Pair("first", "second", tuple(range(8)))
    variants, draws = [], torch.Generator().manual_seed(seed)
    for name in names:
        for choice in (W3, W4):
            variants.append(Variant(name, choice, inputs=8))
            if name == "second":
                variants += [Variant(name, choice, dropped=(0, 1), inputs=8)]
                variants += [Variant(name, choice, split=(0, 1), inputs=8)]
    losses = torch.rand(len(variants), generator=draws).tolist()
    limits = {"average_bits": 3.4, "bops_ratio": 3.4 * 8 / 1024}
    chosen = chosen_shapes(program, variants, losses, (pair,), limits)
    sites = {site.name: site for site in program[Sites].sites}

    def cost(plan: dict[str, Variant], weights: bool) -> float:
        left = 1 - len(plan["second"].dropped) / 8
        spent = whole = 0.0
        for name, each in plan.items():
            amount = sites[name].weight_count if weights else sites[name].macs
            whole += amount
            spent += amount * each.choice.weight_bits * each.factor * (left if name == "first" else 1)
        return spent / whole / (1 if weights else 1024 / 8)

    best = float("inf")
    for picked in product(*([i for i, v in enumerate(variants) if v.site == name] for name in names)):
        plan = {variants[i].site: variants[i] for i in picked}
        if cost(plan, True) <= 3.4 and cost(plan, False) <= limits["bops_ratio"]:
            best = min(best, sum(losses[i] for i in picked))
    assert chosen.predicted == pytest.approx(best)
    assert chosen.used["average_bits"] == pytest.approx(cost(dict(chosen.variants), True))
    assert chosen.used["bops_ratio"] == pytest.approx(cost(dict(chosen.variants), False))
    with pytest.raises(InfeasibleBudgetError, match="no formats and ratios keep average_bits=1"):
        chosen_shapes(program, variants, losses, (pair,), {"average_bits": 1.0})


def test_planned_costs_are_those_of_the_new_network(program: Program, layers: dict[str, Layer]) -> None:
    pair = Pair("first", "second", tuple(range(8)))
    plan = {name: variants_of(layer, (W4,), (), (), False)[0] for name, layer in layers.items()}
    plan["second"] = variants_of(layers["second"], (W4,), (), (0.25,), False)[1]
    plan["head"] = variants_of(layers["head"], (W4,), (0.25,), (), False)[1]
    limits = {"average_bits": 4.0, "bops_ratio": 4 * 8 / 1024, "size_ratio": 0.5, "bops": 1e9}
    chosen = chosen_shapes(program, list(plan.values()), [0.0] * 4, (pair,), limits)
    captured = fxquant.capture(reshaped(program, plan, (pair,)), images())
    new = flow.find_sites(captured, program[Settings])
    tables = flow.run(new, EstimateCost(new[Target]))[CostTables]
    choices = dict.fromkeys(plan, W4)
    assert tables["bops"].of(choices) == pytest.approx(chosen.used["bops"])
    # Restated against the new network's own size, the same bits are the same share.
    assert tables["average_bits"].of(choices) * 4.0 / chosen.restated["average_bits"] == pytest.approx(
        chosen.used["average_bits"]
    )
    old = program[CostTables]["bops"].float_cost / tables["bops"].float_cost
    assert chosen.restated["bops_ratio"] == pytest.approx(limits["bops_ratio"] * old)
    assert chosen.restated["bops"] == limits["bops"]
    sizes = [table["size"].float_cost for table in (program[CostTables], tables)]
    # Biases of outputs that are gone, and places of channels that are read twice, count on one side only.
    assert chosen.restated["size_ratio"] == pytest.approx(0.5 * sizes[0] / sizes[1], rel=0.01)


def test_a_network_with_split_channels_answers_alike(program: Program, layers: dict[str, Layer]) -> None:
    plan = {name: variants_of(layer, (W3,), (0.5,), (), False)[-1] for name, layer in layers.items()}
    assert all(each.split for each in plan.values())
    module, x = reshaped(program, plan, ()), images().double()
    before, after = program.module, module
    error = (fork_double(after)(x) - fork_double(before)(x)).detach().abs().max()
    assert float(error) < 1e-5
    calls = [str(node.target) for node in after.graph.nodes if node.op == "call_function"]
    assert calls.count("aten.index_select.default") == calls.count("aten.cat.default") == 4
    assert [str(node.target) for node in before.graph.nodes].count("aten.cat.default") == 0
    assert program.module.get_parameter("second.weight").shape == (8, 8, 3, 3)
    assert module.get_parameter("second.weight").shape == (8, 12, 3, 3)


def test_channels_left_out_are_those_that_were_zero(program: Program, layers: dict[str, Layer]) -> None:
    pair = Pair("first", "second", tuple(range(8)))
    variant = variants_of(layers["second"], (W4,), (), (0.25,), False)[1]
    module = reshaped(program, {"second": variant}, (pair,))
    assert module.get_parameter("first.weight").shape == (6, 8, 3, 3)
    assert module.get_parameter("first.bias").shape == (6,)
    masked, full = fork(program.module), torch.zeros(8, 8, 3, 3)
    assert variant.weight is not None
    full[:, [c for c in range(8) if c not in variant.dropped]] = variant.weight
    put_tensor(masked, "second.weight", full)
    assert torch.allclose(module(images()), masked(images()), atol=1e-5)
    assert not torch.allclose(module(images()), program.module(images()), atol=1e-5)


def fork_double(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    copy = fork(module)
    for path, tensor in dict(copy.named_parameters()).items():
        put_tensor(copy, path, tensor.detach().double())
    return copy
