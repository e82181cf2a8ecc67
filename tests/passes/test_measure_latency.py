from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import Tensor
from torch.fx import GraphModule

from fxquant.core.errors import OptionError
from fxquant.core.facts import CostTable, CostTables
from fxquant.core.host import Timing, TimingCache
from fxquant.core.ir import FLOAT, Choice, Sites
from fxquant.passes import CHOSEN_RATIOS, MeasureLatency, chosen_plans, measure_latency, mixed_plans
from fxquant.passes.cost import LatencyModel, SiteLink
from tests.programs import check_pass
from tests.scoring import calibrated, inputs

BITS, ACTIVATIONS = (4, 8, 32), (8,)
BORDER = 0.3


class Runtime:
    """Counts what is compiled; time is made up from the graph, not from a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, waiting: float = 0.0) -> None:
        self.compiled: list[GraphModule] = []
        self.inputs: list[tuple[Tensor, ...]] = []
        self.rounds: list[int] = []
        self.waiting, self.pace = waiting, 1.0
        self.modules: list[GraphModule] = []
        monkeypatch.setattr(measure_latency, "time_runs", self.time)

    def compile(self, module: GraphModule, example: tuple[Tensor, ...]) -> Callable[[tuple[Tensor, ...]], Tensor]:
        self.compiled.append(module)
        self.inputs.append(example)

        def run(tensors: tuple[Tensor, ...]) -> Tensor:
            self.modules.append(module)
            found: Tensor = module(*tensors)
            return found

        return run

    def time(self, runs: Sequence[Callable[[], object]], threads: int | None) -> list[Timing]:
        assert threads == 1
        self.rounds.append(len(runs))
        self.modules = []
        for run in runs:
            run()
        return [Timing(self.pace * milliseconds(module), 0.1, 0.0, self.waiting) for module in self.modules]


def milliseconds(module: GraphModule) -> float:
    """Return 1 ms per float conv or linear, 0.25 ms per integer one, 0.5 ms around a whole network, and its borders."""
    called = [n for n in module.graph.nodes if n.op == "call_function"]
    work = [n for n in called if "conv2d" in str(n.target) or "linear" in str(n.target)]
    integer = [n for n in work if n.args[0].op == "call_module"]
    whole = 0.5 if len(work) > 1 else 0.0
    border = BORDER if 0 < len(integer) < len(work) else 0.0
    return len(work) - 0.75 * len(integer) + whole + border


def step(
    name: str, runtime: Runtime, cache: TimingCache | None = None, plans: int = 8, chosen: int = 0
) -> MeasureLatency:
    return MeasureLatency(inputs(name, 1), runtime.compile, 1, cache or TimingCache(None), plans=plans, chosen=chosen)


def measured(runtime: Runtime, name: str = "plain", cache: TimingCache | None = None) -> CostTable:
    program = calibrated(name, BITS, ACTIVATIONS)
    done = check_pass(step(name, runtime, cache), program)
    assert {**done[CostTables].tables}.keys() == {**program[CostTables].tables}.keys() | {"latency"}
    return done[CostTables]["latency"]


def test_both_networks_without_borders_are_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    table = measured(Runtime(monkeypatch))
    names = [site.name for site in calibrated("plain", BITS, ACTIVATIONS)[Sites].sites]
    assert table.float_cost == pytest.approx(4.5, rel=0.01)
    assert table.of(dict.fromkeys(names, FLOAT)) == pytest.approx(table.float_cost)
    assert table.of(dict.fromkeys(names, Choice(8, 8))) == pytest.approx(1.5, rel=0.01)
    assert table.of(dict.fromkeys(names, Choice(4, 8))) == table.of(dict.fromkeys(names, Choice(8, 8)))


def test_a_plan_that_was_not_measured_is_predicted_with_its_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    table = measured(Runtime(monkeypatch), "residual")
    sites = calibrated("residual", BITS, ACTIVATIONS)[Sites].sites
    assert table.products is not None
    plan = {site.name: Choice(8, 8) for site in sites} | {sites[0].name: FLOAT}
    expected = len(sites) - 0.75 * (len(sites) - 1) + 0.5 + BORDER
    assert table.of(plan) == pytest.approx(expected, rel=0.15)


def test_equal_layers_are_timed_once_on_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(monkeypatch)
    measured(runtime)
    # Four sites of four signatures (conv2 and conv3 differ in their bias and readers), float and integer; two wholes.
    assert runtime.rounds == [2, 2, 2, 2, 2 + 8]
    assert len(runtime.compiled) == sum(runtime.rounds)
    assert all(tensor.shape[0] == 1 for example in runtime.inputs for tensor in example)


def test_a_site_used_twice_costs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    table = measured(Runtime(monkeypatch), "shared")
    by = {(c.site, c.choice.label): v for c, v in zip(table.candidates, table.values, strict=True)}
    sites = calibrated("shared", BITS, ACTIVATIONS)[Sites]
    assert len(sites.by_name("conv").nodes) == 2
    uses = sum(len(site.nodes) for site in sites.sites)
    assert by["conv", "float"] == pytest.approx((uses + 0.5) * 2 / uses, rel=0.1)
    assert by["conv", "W8A8"] == pytest.approx((0.25 * uses + 0.5) * 2 / uses, rel=0.25)


def test_the_second_run_measures_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = Runtime(monkeypatch)
    table = measured(first, cache=TimingCache(tmp_path, {"cpu": "A"}))
    again = Runtime(monkeypatch)
    same = measured(again, cache=TimingCache(tmp_path, {"cpu": "A"}))
    assert again.rounds == []
    assert again.compiled == []
    assert (same.values == table.values).all()
    measured(again, cache=TimingCache(tmp_path, {"cpu": "B"}))
    assert again.rounds == first.rounds


def test_batches_of_networks_are_taken_at_one_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    together = measured(Runtime(monkeypatch))
    monkeypatch.setattr(measure_latency, "TOGETHER", 1.0)
    runtime = Runtime(monkeypatch)
    time = runtime.time

    def slowing(runs: Sequence[Callable[[], object]], threads: int | None) -> list[Timing]:
        runtime.pace *= 1.5 if len(runs) > 2 else 1.0
        return time(runs, threads)

    monkeypatch.setattr(measure_latency, "time_runs", slowing)
    apart = measured(runtime)
    assert runtime.rounds[4:] == [4, 4, 4, 4]
    scale = apart.float_cost / together.float_cost
    assert apart.values == pytest.approx(scale * together.values, rel=0.05)


def test_no_network_is_mixed_where_no_site_may_be_float(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(monkeypatch)
    program = calibrated("plain", (4, 8), ACTIVATIONS)
    table = step("plain", runtime)(program)[CostTables]["latency"]
    assert runtime.rounds == [2, 2, 2, 2, 2]
    assert table.products is None
    names = [site.name for site in program[Sites].sites]
    assert table.of(dict.fromkeys(names, Choice(4, 8))) == pytest.approx(1.5, rel=0.01)
    assert table.float_cost == pytest.approx(4.5, rel=0.01)


def test_the_noise_goes_with_the_table_and_a_busy_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = measured(Runtime(monkeypatch)).noise
    assert noise is not None
    assert noise.spread == pytest.approx(0.1)
    assert noise.outliers == noise.waiting == 0.0
    assert 0 <= noise.error < 0.1
    with pytest.warns(UserWarning, match="the machine was busy: this process waited 40 %"):
        measured(Runtime(monkeypatch, waiting=0.4))


def test_a_negative_number_of_plans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for plans, chosen in ((-1, 0), (0, -1)):
        with pytest.raises(OptionError, match=f"plans={plans} and chosen={chosen}"):
            step("plain", Runtime(monkeypatch), plans=plans, chosen=chosen)


def test_plans_that_the_model_finds_fast_are_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(monkeypatch)
    program = calibrated("residual", BITS, ACTIVATIONS)
    table = step("residual", runtime, plans=2, chosen=4)(program)[CostTables]["latency"]
    first, second = runtime.rounds[-2:]
    assert first == 2 + 2
    assert 2 < second <= 2 + 4
    assert table.noise is not None
    assert table.noise.error < 0.05


def test_chosen_plans_are_worth_their_time_and_leave_others_alone() -> None:
    names = tuple(f"layer{k}" for k in range(8))
    places = {SiteLink(one, other, 10): (0.5, 0.5) for one, other in itertools.pairwise(names)}
    model = LatencyModel(dict.fromkeys(names, 2.0), dict.fromkeys(names, 1.0), places, 0.5)
    plans = chosen_plans(model, names[:6], 8, seed=0)
    assert len(plans) > 3
    assert all(plan and plan <= set(names[:6]) for plan in plans)
    assert all(model.predict(plan) <= 0.5 + 8 + CHOSEN_RATIOS[1] * 8 for plan in plans)
    # Borders cost half of what a layer does: few islands, not scattered layers.
    islands = [sum(a not in plan and b in plan for a, b in itertools.pairwise(("", *names))) for plan in plans]
    assert max(islands) <= 3
    assert plans == chosen_plans(model, names[:6], 8, seed=0)
    assert chosen_plans(model, names[:1], 8, seed=0) == []


@pytest.mark.parametrize("seed", range(5))
def test_drawn_plans_mix_and_show_every_costly_border_both_ways(seed: int) -> None:
    names = [f"layer{k}" for k in range(12)]
    places = [SiteLink(a, b, 1000 // (k + 1)) for k, (a, b) in enumerate(itertools.pairwise(names))]
    plans = mixed_plans(names, 8, seed, places)
    assert len(set(plans)) == 8
    assert all(0 < len(plan) < 12 and plan <= set(names) for plan in plans)
    assert plans == mixed_plans(names, 8, seed, places) != mixed_plans(names, 8, seed + 1, places)
    assert {len(plan) for plan in mixed_plans(names[:2], 16, seed)} == {1}
    assert mixed_plans(names[:1], 16, seed) == []
    for place in places[:4]:
        ways = {place.one in plan for plan in plans if (place.one in plan) != (place.other in plan)}
        assert ways == {True, False}
