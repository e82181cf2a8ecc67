"""Results with two plans and a router, by the recipe `dynamic`: limits, files, and what is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.onnx import all_nodes, kernel_report, open_session, session_options
from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.facts import Routes
from fxquant.core.ir import Program
from fxquant.core.run import gradient_magnitude
from fxquant.outputs import write_outputs
from fxquant.result import Result

onnx = pytest.importorskip("onnx")

BUDGET = "average_bits=5"


class Upscaler(nn.Module):
    """Three convolutions and a shuffle of pixels: an image of twice the side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.tail = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.body(torch.relu(self.stem(x))))
        return torch.pixel_shuffle(self.tail(y), 2)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Upscaler().eval()


def patches(count: int = 24) -> Tensor:
    """Return patches from flat to busy."""
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return noise * torch.linspace(0.05, 2.0, count).reshape(-1, 1, 1, 1)


@cache
def routed() -> Result:
    return fxquant.quantize(network(), patches(), BUDGET, recipe="dynamic", progress=False)


def run_file(path: Path, images: Tensor) -> Tensor:
    session = open_session(path, session_options(1))
    name = session.get_inputs()[0].name
    return torch.cat([torch.from_numpy(session.run(None, {name: each.numpy()})[0]) for each in torch.split(images, 1)])


def test_mean_cost_keeps_the_limit_and_hard_patches_get_more_bits() -> None:
    result = routed()
    fit, plans = result.routed.fit, result.routed.plans
    hard, easy = (result.costs["average_bits"].of(plans[name].choices) for name in ("hard", "easy"))
    assert easy < hard
    chosen = gradient_magnitude(patches()) > fit.threshold
    assert 0 < chosen.sum() < len(chosen)
    assert fit.share == float(chosen.float().mean())
    mean = float(torch.where(chosen, torch.tensor(hard).double(), torch.tensor(easy).double()).mean())
    assert mean == pytest.approx(fit.used["average_bits"], rel=1e-6)
    assert mean <= 5 + 1e-6
    # The plan of the result itself keeps the limit for every patch.
    assert result.allocation.used["average_bits"] <= 5
    assert "run the plan for hard ones; mean average_bits" in result.summary()


def test_simulation_gives_each_image_the_answer_of_its_plan() -> None:
    network, images = routed().routed, patches()
    chosen = network.router.hard(images)
    one = torch.cat(
        [network.graphs["hard" if c else "easy"](x) for c, x in zip(chosen, torch.split(images, 1), strict=True)]
    )
    assert torch.allclose(network.simulated(images), one, atol=1e-6)
    assert not torch.allclose(network.graphs["easy"](images), one, atol=1e-3)
    flat = torch.zeros(2, 1, 8, 8)
    assert torch.equal(network.simulated(flat), network.graphs["easy"](flat))


def test_one_file_answers_as_the_files_of_both_plans_on_integer_kernels(tmp_path: Path) -> None:
    network, images = routed().routed, patches()
    report = network.to_onnx(tmp_path / "routed.onnx")
    assert report.nodes["If"] == 1
    alone = {}
    for name, graph in network.graphs.items():
        _ = fxquant.export_onnx(Program(graph), tmp_path / f"{name}.onnx")
        alone[name] = run_file(tmp_path / f"{name}.onnx", images)
    chosen = network.router.hard(images).reshape(-1, 1, 1, 1)
    assert torch.equal(run_file(tmp_path / "routed.onnx", images), torch.where(chosen, alone["hard"], alone["easy"]))
    options = session_options(1)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    _ = open_session(tmp_path / "routed.onnx", options)
    run = [node.op_type for node in all_nodes(onnx.load(tmp_path / "optimized.onnx").graph)]
    assert run.count("QLinearConv") == 6
    assert "Conv" not in run
    assert set(kernel_report(tmp_path / "routed.onnx").kernels.values()) == {"QLinearConv"}
    # Weights that both plans store alike are there once.
    graph = onnx.load(tmp_path / "routed.onnx").graph
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    held = [tensor.raw_data for each in (graph, *inner) for tensor in each.initializer if len(tensor.raw_data) > 8]
    assert len(held) == len(set(held))
    assert any(tensor.name.startswith("s_") for tensor in graph.initializer)


def test_a_saved_result_routes_alike(tmp_path: Path) -> None:
    result = routed()
    back = fxquant.load(result.save(tmp_path / "saved"))
    assert back.routed.fit == result.routed.fit
    assert torch.equal(back.routed.simulated(patches()), result.routed.simulated(patches()))
    (tmp_path / "saved" / "easy_plan.json").unlink()
    with pytest.raises(FileFormatError, match="easy_plan"):
        fxquant.load(tmp_path / "saved")


def test_outputs_hold_the_routed_file(tmp_path: Path) -> None:
    written = write_outputs(routed(), tmp_path / "out")
    assert tmp_path / "out" / "model.routed.onnx" in written
    assert all(path.is_file() for path in written)


def test_another_budget_is_routed_again() -> None:
    again = fxquant.resolve(routed(), "average_bits=3.5", progress=False)
    assert again.routed.fit.used["average_bits"] <= 3.5 < routed().routed.fit.used["average_bits"]
    with pytest.raises(OptionError, match="limits in the mean over patches, which size_mb does not have"):
        fxquant.resolve(routed(), "size_mb=0.01", progress=False)


@pytest.mark.parametrize(
    ("images", "budget", "message"),
    [
        (patches(), "size_mb=0.01", "which size_mb does not have; limit average_bits, bops, bops_ratio"),
        (patches(), "average_bits=5,loss=0.1", "which loss does not have"),
        (torch.randn(24, 3), BUDGET, r"a router needs float images \(N, C, H, W\)"),
    ],
)
def test_what_cannot_be_routed_is_refused(images: Tensor, budget: str, message: str) -> None:
    model = network() if images.dim() == 4 else nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(OptionError, match=message):
        fxquant.quantize(model, images, budget, recipe="dynamic", progress=False)


def test_without_routes_there_is_no_routed_network() -> None:
    result = fxquant.quantize(network(), patches(), BUDGET, effort="fast", progress=False)
    assert Routes not in result.program
    with pytest.raises(OptionError, match="recipe='dynamic' or routed=True"):
        _ = result.routed


def test_same_seed_same_routes() -> None:
    again = fxquant.quantize(network(), patches(), BUDGET, recipe="dynamic", progress=False)
    assert again.routed.fit == routed().routed.fit
    plans: list[Any] = [each.routed.plans for each in (again, routed())]
    assert plans[0]["easy"].choices == plans[1]["easy"].choices
