from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from torch import Tensor
from torch.fx import GraphModule

from fxquant.core.cost import CostTable, CostTables
from fxquant.core.spec import Choice, Sites
from fxquant.passes import measure_latency
from fxquant.passes.measure_latency import MeasureLatency, shared_out
from tests.programs import check_pass
from tests.scoring import calibrated, inputs, simulated

BITS, ACTIVATIONS = (4, 8, 32), (8,)


class Runtime:
    """Counts what is compiled; time is made up from the graph, not from a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled: list[GraphModule] = []
        self.inputs: list[tuple[Tensor, ...]] = []
        monkeypatch.setattr(measure_latency, "time_interleaved", self.time)

    def compile(self, module: GraphModule, example: tuple[Tensor, ...]) -> Callable[[tuple[Tensor, ...]], Tensor]:
        self.compiled.append(module)
        self.inputs.append(example)

        def run(tensors: tuple[Tensor, ...]) -> Tensor:
            found: Tensor = module(*tensors)
            return found

        return run

    def time(self, runs: Sequence[Callable[[], object]]) -> list[float]:
        for run in runs:
            run()
        return [milliseconds(module) for module in self.compiled[-len(runs) :]]


def milliseconds(module: GraphModule) -> float:
    """1 ms per float conv or linear, 0.25 ms per integer one, 0.5 ms around a whole network."""
    nodes = list(module.graph.nodes)
    work = [n for n in nodes if "conv2d" in str(n.target) or "linear" in str(n.target)]
    integer = any(n.op == "call_module" for n in nodes)
    return len(work) * (0.25 if integer else 1.0) + (0.5 if len(work) > 1 else 0.0)


def measured(monkeypatch: pytest.MonkeyPatch, name: str = "plain") -> tuple[CostTable, Runtime]:
    runtime, program = Runtime(monkeypatch), calibrated(name, BITS, ACTIVATIONS)
    step = MeasureLatency(simulated(name, BITS, ACTIVATIONS).module, inputs(name, 1), runtime.compile)
    done = check_pass(step, program)
    assert {**done[CostTables].tables}.keys() == {**program[CostTables].tables}.keys() | {"latency"}
    return done[CostTables]["latency"], runtime


def test_both_networks_that_were_measured_whole_are_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = measured(monkeypatch)
    names = [site.name for site in calibrated("plain", BITS, ACTIVATIONS)[Sites].sites]
    assert table.float_cost == 4.5
    assert table.of(dict.fromkeys(names, Choice(32, 32))) == pytest.approx(4.5)
    assert table.of(dict.fromkeys(names, Choice(8, 8))) == pytest.approx(1.5)
    assert table.of(dict.fromkeys(names, Choice(4, 8))) == pytest.approx(1.5)
    assert table.of({**dict.fromkeys(names, Choice(8, 8)), "fc": Choice(32, 32)}) == pytest.approx(2.25)


def test_equal_layers_are_timed_once_on_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    _, runtime = measured(monkeypatch)
    # Four sites of four signatures (conv2 and conv3 differ in their bias and readers), float and integer, two wholes.
    assert len(runtime.compiled) == 2 * 4 + 2
    assert all(tensor.shape[0] == 1 for example in runtime.inputs for tensor in example)


def test_a_site_used_twice_costs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = measured(monkeypatch, "shared")
    by = {(c.site, c.choice.label): v for c, v in zip(table.candidates, table.values, strict=True)}
    sites = calibrated("shared", BITS, ACTIVATIONS)[Sites]
    assert len(sites.by_name("conv").nodes) == 2
    uses = sum(len(site.nodes) for site in sites.sites)
    assert by["conv", "float"] == pytest.approx((uses + 0.5) * 2 / uses)
    assert by["conv", "W8A8"] == pytest.approx((0.25 * uses + 0.5) * 2 / uses)


def test_the_shares_add_up_to_the_whole_network() -> None:
    shares = shared_out(6.0, {"stem": 1.0, "body": 3.0})
    assert shares == {"stem": 1.5, "body": 4.5}
