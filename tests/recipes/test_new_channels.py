"""The recipes `expand` and `prune` from a model to a file."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant.backends.onnx import executable, kernel_report
from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.ir import Sites
from fxquant.core.run import model_outputs
from fxquant.result import Result
from tests.small import images as small_images
from tests.small import small

pytest.importorskip("onnx")


class Block(nn.Module):
    """A convolution, a residual block and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        y = torch.relu(y + self.second(torch.relu(self.first(y))))
        scores: Tensor = self.head(y.mean(dim=(2, 3)))
        return scores


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Block().eval()


@cache
def made(recipe: str) -> Result:
    bits = {"expand": (3,), "prune": (2, 4)}[recipe]
    return fxquant.quantize(network(), small_images(48), "average_bits=3.3", recipe=recipe, bits=bits, progress=False)


def test_expanded_at_one_width_within_the_budget() -> None:
    result = made("expand")
    assert {choice.label for choice in result.allocation.choices.values()} == {"W3A8"}
    weights = sum(site.weight_count for site in result.program[Sites].sites)
    old = sum(p.numel() for p in network().parameters() if p.dim() > 1)
    assert old < weights <= 3.3 / 3 * old
    assert "input channels split" in result.allocation.notes[0]
    images = small_images(8)
    # Exact in float, before and after equalization of channels.
    assert torch.allclose(result.program.module(images), network()(images), atol=1e-5)


def test_pruned_within_the_budget() -> None:
    result = made("prune")
    old = sum(p.numel() for p in network().parameters() if p.dim() > 1)
    sites = {site.name: site for site in result.program[Sites].sites}
    bits = sum(site.weight_count * result.allocation.choices[name].weight_bits for name, site in sites.items())
    assert bits <= 3.3 * old
    assert "input channels" in result.allocation.notes[0] or "no channel" in result.allocation.notes[0]


@pytest.mark.parametrize("recipe", ["expand", "prune"])
def test_what_is_saved_loads_and_runs_on_integer_kernels(recipe: str, tmp_path: Path) -> None:
    result, images = made(recipe), small_images(8)
    back = fxquant.load(result.save(tmp_path / "saved"))
    assert torch.equal(back.simulated(images), result.simulated(images))
    assert back.allocation.notes == result.allocation.notes
    report = result.to_onnx(tmp_path / "model.onnx")
    ran = kernel_report(report.path)
    assert ran.float_layers == ()
    assert ran.float_products == 0
    assert torch.allclose(executable(report.path)((images,)), result.simulated(images), atol=1e-4)


@pytest.mark.parametrize("recipe", ["expand", "prune"])
def test_limits_that_do_not_follow_from_channels_are_refused(recipe: str) -> None:
    for budget, what in (("latency_ms=1", "latency_ms"), ("average_bits=4,loss=0.1", "loss"), (None, "no budget")):
        with pytest.raises(OptionError, match=f"choose channels within limits on average_bits.*{what}"):
            fxquant.quantize(small(), small_images(8), budget, recipe=recipe, progress=False)


@pytest.mark.parametrize("value", [(0.0,), (1.5,), (-0.1,)])
def test_ratios_out_of_range_are_refused(value: tuple[float, ...]) -> None:
    with pytest.raises(OptionError, match="expand"):
        fxquant.quantize(small(), small_images(8), "average_bits=4", options={"expand": value}, progress=False)


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Result:
        return fxquant.quantize(
            small(), small_images(16), "average_bits=5", recipe="prune", workdir=tmp_path, progress=False
        )

    first, counted = run(), list[int]()
    cells = sorted((tmp_path / "scores" / "channels").glob("variant-*.npz"))
    assert len(cells) > 5
    cells[0].unlink()

    def count(module: GraphModule, inputs: tuple[Tensor, ...]) -> Tensor:
        counted.append(1)
        return model_outputs(module, inputs)

    monkeypatch.setattr("fxquant.flow.other_channels.model_outputs", count)
    again = run()
    # The float answers, and the one variant that was missing.
    assert len(counted) == 2
    assert again.allocation.to_json() == first.allocation.to_json()
    with pytest.raises(FileFormatError, match="another data"):
        fxquant.quantize(small(), small_images(12), "average_bits=5", recipe="prune", workdir=tmp_path, progress=False)
