from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fxquant import flow
from fxquant.capture import capture
from fxquant.core.facts import BitAllocation, FakeQuantNodes, Settings
from fxquant.core.ir import Choice, EdgeGroups, Sites, WeightFormat, resolve
from fxquant.core.run import CalibrationSet
from fxquant.passes import simulate, widest_plan
from fxquant.passes.sensitivity import Replacements, columns_of
from tests.models import Composed
from tests.scoring import inputs, scorer, simulated


def test_one_activation_width_makes_one_column_per_candidate() -> None:
    program = simulated("plain")
    columns, spread = columns_of(program, Replacements(program))
    assert [(c.site, c.weight_bits) for c in columns] == [
        (c.site, c.choice.weight_bits) for c in program[Sites].candidates
    ]
    assert np.array_equal(spread, np.eye(12))
    conv1 = columns[0]
    nodes = program[FakeQuantNodes]
    assert set(conv1.substitution) == {*nodes.weights["conv1"], *nodes.inputs["conv1"]}


def test_several_widths_are_perturbed_apart_from_weights() -> None:
    program = simulated("plain", (2, 8), (4, 8))
    columns, spread = columns_of(program, Replacements(program))
    # Four sites at two widths, and three ties (image, the value two layers read, pooled) at two widths.
    assert [c.owner for c in columns if c.site is None] == [
        f"tie {t}" for t in ("x", "x", "relu", "relu", "mean", "mean")
    ]
    assert len(columns) == 8 + 6
    assert spread.shape == (16, 14)
    row = {c: k for k, c in enumerate(program[Sites].candidates)}
    plan = {site.name: Choice(2, 4) for site in program[Sites].sites}
    chosen = sum(spread[row[c]] for c in row if plan[c.site] == c.choice)
    # A whole plan carries each tie's column once, however many sites read it.
    assert sorted(chosen) == [0.0] * 7 + [1.0] * 7


def test_a_tie_rounds_every_value_of_its_groups() -> None:
    program = simulated("residual", (8,), (4, 8))
    columns, _ = columns_of(program, Replacements(program))
    groups, nodes = program[EdgeGroups], program[FakeQuantNodes]
    for column in columns:
        if column.site is None:
            members = [g for g, tie in groups.bit_ties.items() if f"tie {tie}" == column.owner]
            assert set(column.substitution) == {name for g in members for name in nodes.activations[g]}


@pytest.mark.parametrize(("name", "count"), [("attention", 3), ("concat", 1)])
def test_what_lies_on_the_grid_already_is_not_rounded_again(name: str, count: int) -> None:
    program = simulated(name, (8,), (4, 8))
    columns, _ = columns_of(program, Replacements(program))
    groups, nodes = program[EdgeGroups], program[FakeQuantNodes]
    each = scorer(program, CalibrationSet(inputs(name, 3)))
    base, shorter = each.base(each.batches[0]).environment, 0
    for column in columns:
        if column.site is not None or column.activation_bits is None:
            continue
        members = [g for g, tie in groups.bit_ties.items() if f"tie {tie}" == column.owner]
        every = {name for g in members for name in nodes.activations[g]}
        assert set(column.substitution) <= every
        shorter += column.activation_bits == 4 and len(column.substitution) < len(every)
        grid = {g: next(r for n, r in column.substitution.items() if n in nodes.activations[g]) for g in members}
        whole = {n: grid[g] for g in members for n in nodes.activations[g]}
        with torch.no_grad():
            answer, _ = each.replay.replay(base, {**each.off, **column.substitution}, changed=column.substitution)
            expected, _ = each.replay.replay(base, {**each.off, **whole}, changed=whole)
        assert torch.equal(answer, expected)
        # In turn, each node that is rounded matters.
        for left in column.substitution:
            some = {n: r for n, r in column.substitution.items() if n != left}
            with torch.no_grad():
                other, _ = each.replay.replay(base, {**each.off, **some}, changed=some)
            assert not torch.equal(answer, other)
    assert shorter == count


def test_what_an_op_computes_from_a_rounded_value_is_rounded() -> None:
    """A value and what a layer makes of it are concatenated: one group, with arithmetic between its members."""
    torch.manual_seed(2)
    layers = {"inner": nn.Conv2d(3, 3, 3, padding=1), "last": nn.Conv2d(6, 4, 1)}
    dense = Composed(lambda net, x: net.last(torch.cat([x, net.inner(x)], dim=1)).mean(dim=(2, 3)), **layers)
    images = (torch.randn(4, 3, 5, 5),)
    settings = Settings(bits=(8,), activation_bits=(4, 8), target="reference", estimators=("gram",))
    program = flow.prepare(capture(dense.eval(), images), settings)
    program = flow.calibrate(program, CalibrationSet(images))
    program = simulate(program, widest_plan(program), round_biases=False)
    ((group, members),) = (g for g in program[FakeQuantNodes].activations.items() if len(g[1]) > 1)
    rounded = Replacements(program).group(group, 4)
    assert len(members) == 3
    # The image and the layer's output; the concatenation of both lies on the grid.
    assert [resolve(program.module.graph, name).all_input_nodes[0].name for name in rounded] == ["x", "conv2d"]


def test_the_same_width_is_the_same_object_so_that_nothing_counts_as_changed() -> None:
    program = simulated("plain")
    quantizers = Replacements(program)
    plan = BitAllocation({site.name: Choice(4, 8) for site in program[Sites].sites})
    parts = quantizers.plan(plan)
    assert set(parts) == {site.name for site in program[Sites].sites} | {"tie x", "tie relu", "tie mean"}
    again = quantizers.weight("fc", WeightFormat(4))
    assert all(parts["fc"][name] is replacement for name, replacement in again.items())
    inputs = quantizers.inputs("fc", 8)
    assert all(parts["tie mean"][name] is replacement for name, replacement in inputs.items())


def test_a_float_site_leaves_its_weight_alone() -> None:
    program = simulated("plain", (4, 32))
    names = [site.name for site in program[Sites].sites]
    plan = BitAllocation({name: Choice.parse("float" if name == "fc" else "W4A8") for name in names})
    parts = Replacements(program).plan(plan)
    assert parts["fc"] == {}
    assert parts["conv1"]
    assert "tie mean" not in parts


@pytest.mark.parametrize("bits", [2, 8])
def test_a_rounded_weight_has_at_most_two_to_the_bits_values(bits: int) -> None:
    program = simulated("plain")
    (replacement,) = set(Replacements(program).weight("fc", WeightFormat(bits)).values())
    value = replacement(torch.empty(0))
    assert all(len(row.unique()) <= 2**bits for row in value)
