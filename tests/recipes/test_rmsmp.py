"""Rows of two schemes in one layer: kernels compute what the dequantized rows say, layers differ in their shares."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.onnx import executable, kernel_report
from fxquant.core.facts import FakeQuantNodes, WeightGrids
from fxquant.core.ir import Sites, WeightFormat, tensor_at
from fxquant.core.run import first_tensor
from fxquant.result import Result

pytest.importorskip("onnx")


def tailed(*shape: int) -> Tensor:
    """Return weights whose rows differ: of few large values and many small ones, or evenly spread, or large."""
    draw = torch.Generator().manual_seed(3)
    rows = torch.randn(*shape, generator=draw)
    rows[::3] = rows[::3] ** 5
    rows[1::3] = 2 * torch.rand(rows[1::3].shape, generator=draw) - 1
    rows[2] *= 20
    return rows


def single(kind: str) -> tuple[nn.Module, Tensor]:
    """Return one layer, whose answer is no longer quantized, and its inputs."""
    draw = torch.Generator().manual_seed(0)
    layer: nn.Module = nn.Conv2d(3, 24, 3, padding=1) if kind == "convolution" else nn.Linear(40, 24)
    with torch.no_grad():
        _ = layer.get_parameter("weight").copy_(tailed(*layer.get_parameter("weight").shape))
    return layer.eval(), torch.rand(*((8, 3, 6, 6) if kind == "convolution" else (8, 40)), generator=draw)


@cache
def of_one(kind: str) -> Result:
    model, images = single(kind)
    pins = {"*": "W5sA8"}
    return fxquant.quantize(
        model, images, "average_bits=6", recipe="rmsmp", progress=False, options={"pins": pins, "loss": "mse"}
    )


@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_integer_kernels_give_the_products_of_the_dequantized_rows(kind: str, tmp_path: Path) -> None:
    result, (_, images) = of_one(kind), single(kind)
    (site,) = result.program[Sites].sites
    assert result.allocation.choices[site.name].weight == WeightFormat(5, "two-scheme")
    grid = result.program[WeightGrids].at(site.name, WeightFormat(5, "two-scheme"))
    assert grid.levels is not None
    # All three kinds of rows: powers of two, 16 even levels, 256 even levels.
    assert {len(torch.unique(row)) for row in grid.levels} == {15, 16, 256}
    simulated = result.simulated_program
    nodes = simulated[FakeQuantNodes]
    (quantizer,) = nodes.weights[site.name]
    weight = tensor_at(simulated.module, site.weight).detach()
    rows = simulated.module.get_submodule(quantizer)(weight)
    assert torch.equal(rows, grid.round_trip(weight))
    assert not torch.equal(rows, weight)
    source, *answer = (simulated.module.get_submodule(names[0]) for names in nodes.activations.values())
    read = source(images).double()
    bias = tensor_at(simulated.module, f"{site.weight.rpartition('weight')[0]}bias").detach().double()
    wanted = (
        nn.functional.conv2d(read, rows.double(), bias, padding=1)
        if kind == "convolution"
        else nn.functional.linear(read, rows.double(), bias)
    )
    report = result.to_onnx(tmp_path / "model.onnx")
    assert kernel_report(report.path).float_products == 0
    for found in (first_tensor(fxquant.lower(result, "fx_int8")(images)), executable(report.path)((images,))):
        # Sums of integers are exact; what is left is the rounding of the bias, and of one product in float32.
        if not answer:
            assert float((found.double() - wanted).abs().max()) < 2e-4 * float(wanted.abs().max())
            continue
        # The answer of a convolution is rounded to 8 bits: to the same, but for values that lie on an edge.
        steps = (found - answer[0](wanted.float())).abs() / answer[0].step
        assert float((steps > 0.5).double().mean()) < 2e-3
        assert float(steps.max()) < 1.5


class Unlike(nn.Module):
    """Two layers side by side, one of even rows, and one whose few large rows decide the answer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.even, self.tailed = nn.Linear(64, 24), nn.Linear(64, 24)
        with torch.no_grad():
            self.tailed.weight[:6] *= 30

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.even(x) + self.tailed(x)
        return answer


def test_the_share_of_wide_rows_is_chosen_for_each_layer() -> None:
    inputs = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    result = fxquant.quantize(
        Unlike().eval(),
        inputs,
        "average_bits=4.8",
        recipe="rmsmp",
        target="reference",
        progress=False,
        options={"loss": "mse"},
    )
    widths = {name: choice.weight_bits for name, choice in result.allocation.choices.items()}
    assert widths == {"even": 4.4, "tailed": 5}
    wide = {}
    for site in result.program[Sites].sites:
        grid = result.program[WeightGrids].at(site.name, result.allocation.choices[site.name].weight)
        assert grid.levels is not None
        wide[site.name] = [row for row, levels in enumerate(grid.levels) if len(torch.unique(levels)) == 256]
    # A tenth and a quarter of the rows, those of most error.
    assert len(wide["even"]) == 2
    assert wide["tailed"] == list(range(6))
