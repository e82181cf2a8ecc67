"""Peak activation memory against a walk through the graph with real tensors, and against every plan by brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import Interpreter, Node

from fxquant.capture import capture
from fxquant.core.facts import agrees
from fxquant.core.ir import FLOAT, Choice, EdgeGroups, Program, Sites
from fxquant.passes import FindEdges, FindSites, TieEdges
from fxquant.passes.cost import COSTS, stored_bytes, worst_rows
from tests.models import MODELS, Composed
from tests.programs import TARGET, folded, tied, uniform

activation = COSTS["activation"]
PACKING = replace(TARGET, name="packing", activation_storage_bits={4: 4})


def sited(name: str, bits: tuple[int, ...] = (8, 32), activation_bits: tuple[int, ...] = (4, 8)) -> Program:
    return FindSites(TARGET, bits, activation_bits)(tied(name))


def test_a_residual_block_by_hand() -> None:
    """x 3x8x8 -> conv1+relu -> conv2 -> add+relu -> (silu, conv3) -> add -> mean -> fc, every map 8x8x8."""
    table = activation(sited("residual"), PACKING)
    maps = 512
    # The worst moment is the last add: silu's answer and the sum in float32, conv3's answer at 8 bits.
    assert table.of(uniform(sited("residual"), 8)) == 2 * 4 * maps + maps
    assert table.float_cost == 3 * 4 * maps
    # With conv2 in float, the add reads conv1's answer in float32 and conv2's, which no site reads, at 8 bits.
    # With conv3 in float as well, it writes float32, and this moment is as bad.
    one = {"conv1": Choice(8, 8), "conv2": FLOAT, "conv3": Choice(8, 8), "fc": Choice(8, 8)}
    both = {**one, "conv3": FLOAT}
    assert table.of(one) == 2 * 4 * maps + maps
    assert table.of(both) == 2 * 4 * maps + maps
    # silu reads the sum and writes its answer, both float32; conv3 then adds its own.
    rows, constants = table.rows
    picked = [k for k, c in enumerate(table.candidates) if both[c.site] == c.choice]
    assert sorted((constants + rows[:, picked].sum(axis=1)) / maps)[-1] == 9


def test_storage_widths() -> None:
    assert [stored_bytes(3, bits, TARGET) for bits in (4, 8, 32)] == [3, 3, 12]
    assert [stored_bytes(3, bits, PACKING) for bits in (4, 8, 32)] == [2, 3, 12]


@pytest.mark.parametrize("name", ["residual", "shared", "concat", "two_inputs", "name_clash", "tokens", "sequence"])
def test_runtimes_without_packing_gain_nothing_from_narrow_activations(name: str) -> None:
    program = sited(name)
    table = activation(program, TARGET)
    assert table.of(uniform(program, 8, 4)) == pytest.approx(table.of(uniform(program, 8, 8)))
    packed = activation(program, PACKING)
    assert packed.of(uniform(program, 8, 4)) <= table.of(uniform(program, 8, 4))
    assert table.of(uniform(program, 8, 8)) <= table.float_cost


def peak_of_real_tensors(name: str) -> int:
    """Run the float graph on one sample and return the most bytes of storages that were needed at one time."""
    module = folded(name).module
    nodes = [node for node in module.graph.nodes if node.op != "get_attr"]
    storages: dict[Node, set[int]] = {}
    sizes: dict[int, int] = {}
    keep = []

    class Watched(Interpreter):
        def run_node(self, node: Node) -> object:
            value = super().run_node(node)
            keep.append(value)
            if node.op in ("placeholder", "call_function"):
                parts = [t for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, torch.Tensor)]
                storages[node] = {t.untyped_storage().data_ptr() for t in parts}
                sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts})
                source = node.args[0] if node.args else None
                # A clip of a value that nothing else reads works in place.
                clip = any(word in str(node.target) for word in ("relu.", "relu6.", "hardtanh", "clamp"))
                if clip and isinstance(source, Node) and len(source.users) == 1:
                    storages[node] = storages[source]
            return value

    with torch.no_grad():
        Watched(module).run(*MODELS[name].inputs(1))
    weights = {p.untyped_storage().data_ptr() for p in module.state_dict().values()}
    peak = 0
    for moment, node in enumerate(nodes):
        live = set(storages.get(node, set()))
        for made in nodes:
            born = 0 if made.op == "placeholder" else nodes.index(made)
            used = max(
                (nodes.index(user) for user in made.users if user in storages or user.op == "output"), default=born
            )
            if born <= moment <= used:
                live |= storages.get(made, set())
        peak = max(peak, sum(sizes[pointer] for pointer in live - weights))
    return peak


@pytest.mark.parametrize(
    "name", ["residual", "separable", "shared", "padded", "concat", "two_inputs", "sequence", "tokens", "name_clash"]
)
def test_the_float_peak_is_that_of_real_tensors(name: str) -> None:
    assert activation(sited(name), TARGET).float_cost == peak_of_real_tensors(name)


def peak_of_plan(program: Program, plan: dict[str, Choice]) -> float:
    """Walk through the graph once for a plan: what is held after each node, counted value by value."""
    graph, groups = program.module.graph, program[EdgeGroups]
    values = [n for n in graph.nodes if n.op != "get_attr" and isinstance(n.meta.get("val"), torch.Tensor | tuple)]
    values = [node for node in values if node.op != "output"]
    order = [*values, next(node for node in graph.nodes if node.op == "output")]
    tie_bits = {site.input_tie: plan[site.name].activation_bits for site in program[Sites].sites}
    quantized = {(edge.producer, edge.consumer): name for name, edges in groups.edges.items() for edge in edges}
    in_place: dict[Node, Node] = {}
    for node in values:
        view = any(word in str(node.target) for word in ("reshape", "flatten", "squeeze", "slice", "select", "permute"))
        clip = any(word in str(node.target) for word in ("relu.", "relu6.", "hardtanh", "clamp"))
        if view or "getitem" in str(node.target) or (clip and len(node.all_input_nodes[0].users) == 1):
            in_place[node] = in_place.get(node.all_input_nodes[0], node.all_input_nodes[0])
    worst = 0.0
    for moment in range(len(order)):
        held: dict[tuple[Node, str | None], float] = {}
        for node in values:
            root = in_place.get(node, node)
            if values.index(root) > moment and root.op != "placeholder":
                continue
            made = root.meta["val"] if isinstance(root.meta["val"], tuple) else (root.meta["val"],)
            elements = sum(int(np.prod([1, *tensor.shape[1:]])) for tensor in made if tensor.shape[0] != 0)
            for user in set(node.users) & set(order):
                if order.index(user) >= moment and in_place.get(user) is not root:
                    group = quantized.get((node.name, user.name))
                    bits = 32 if group is None else tie_bits.get(groups.bit_ties[group], 8)
                    held[root, group] = ceil(elements * bits / 8)
        worst = max(worst, sum(held.values()))
    return worst


@pytest.mark.parametrize("name", ["residual", "separable", "shared", "padded", "concat", "two_inputs", "name_clash"])
def test_every_plan_against_a_walk_through_the_graph(name: str) -> None:
    program = sited(name)
    table, sites = activation(program, PACKING), program[Sites].sites
    names = [site.name for site in sites]
    count = 0
    for row in product(*(site.choices for site in sites)):
        plan = dict(zip(names, row, strict=True))
        ties: dict[str, set[bool]] = {}
        for site in sites:
            ties.setdefault(site.input_tie, set()).add(plan[site.name].is_float)
        if not agrees(sites, plan) or any(len(kinds) > 1 for kinds in ties.values()):
            continue
        assert table.of(plan) == pytest.approx(peak_of_plan(program, plan)), plan
        count += 1
    assert count > 1


def test_a_value_that_two_sites_read_is_held_once() -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(net.wide(x))
        product: torch.Tensor = net.left(x) * net.right(x)
        return product

    fork = Composed(forward, wide=nn.Conv2d(1, 16, 1), left=nn.Conv2d(16, 1, 1), right=nn.Conv2d(16, 1, 1))
    captured = capture(fork.eval(), (torch.randn(2, 1, 6, 6),))
    program = FindSites(TARGET, (8,), (4, 8))(TieEdges()(FindEdges(TARGET)(captured)))
    table, narrow = activation(program, PACKING), uniform(program, 8, 4)
    # The wide value, the answer of one layer at 8 bits, and that of the other.
    assert table.of(uniform(program, 8)) == 16 * 36 + 36 + 36
    assert table.of(narrow) == 16 * 36 / 2 + 36 + 36


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_needless_rows_change_no_peak(seed: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 4, draw.integers(1, 4))
    values = draw.integers(0, 4, (8, int(sizes.sum()))).astype(float)
    constants = draw.integers(0, 4, 8).astype(float)
    starts = np.cumsum([0, *sizes])[:-1]
    kept, left = worst_rows(values, constants, starts)
    plans = [np.array(p) for p in product(*(range(s, s + n) for s, n in zip(starts, sizes, strict=True)))]
    for plan in plans:
        assert (left + kept[:, plan].sum(axis=1)).max() == (constants + values[:, plan].sum(axis=1)).max()
    assert len(kept) <= 8


def test_rows_that_cannot_be_largest_are_left_out() -> None:
    values = np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 1.5], [3.0, 0.0]])
    kept, constants = worst_rows(values, np.zeros(4), np.array([0]))
    assert sorted(map(tuple, kept)) == [(1.0, 2.0), (3.0, 0.0)]
    assert constants.tolist() == [0.0, 0.0]


def test_a_network_without_sites_has_a_peak_all_the_same() -> None:
    table = activation(sited("weightless"), TARGET)
    assert table.of({}) == table.float_cost > 0
