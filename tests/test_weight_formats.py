"""Weight formats from the call to the file: what a user of `quantize` gets."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.core.errors import OptionError
from fxquant.core.facts import WeightGrids
from fxquant.core.ir import Sites, WeightFormat
from fxquant.result import Result

FORMATS = ("2c", "3p", "2.5r")
PLAN = {"stem": "W8A8", "body": "W2cA8", "tail": "W2.5rA8", "head": "W3pA8"}


class Net(nn.Module):
    """Four layers of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2)
        self.tail, self.head = nn.Conv2d(16, 16, 3), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.tail(torch.relu(self.body(torch.relu(self.stem(x))))))
        found: Tensor = self.head(y.mean((2, 3)))
        return found


def images() -> Tensor:
    return torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@cache
def planned() -> Result:
    """Return the network with one layer of each format."""
    return fxquant.quantize(
        Net().eval(),
        images(),
        fxquant.Budget(average_bits=8),
        bits=(*FORMATS, 8),
        effort="fast",
        progress=False,
        options={"pins": PLAN},
    )


@cache
def two_schemes() -> Result:
    """Return the network with rows of powers of two, 4 and 8 bits in every layer."""
    budget = fxquant.Budget(average_bits=8)
    options = {"pins": {"*": "W5sA8"}}
    return fxquant.quantize(
        Net().eval(), images(), budget, bits=("5s",), effort="fast", progress=False, options=options
    )


def test_every_layer_gets_the_format_it_was_given() -> None:
    result = planned()
    assert {name: choice.label for name, choice in result.allocation.choices.items()} == PLAN
    for site in result.program[Sites].sites:
        grid = result.program[WeightGrids].at(site.name, result.allocation.choices[site.name].weight)
        assert (grid.levels is None) == (site.name == "stem")


@pytest.mark.parametrize("made", [planned, two_schemes])
def test_the_file_and_the_integer_graph_answer_as_the_simulation(made: Callable[[], Result], tmp_path: Path) -> None:
    result, x = made(), images()
    wanted = result.simulated(x).detach()
    step = float(wanted.abs().max()) / 100
    found = result.lowered(x)
    assert float((found - wanted).abs().max()) < step
    session = onnxruntime.InferenceSession(str(result.to_onnx(tmp_path / "model.onnx").path))
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert float(np.abs(answer - wanted.numpy()).max()) < step


def test_kernels_multiply_the_dequantized_rows_of_two_schemes() -> None:
    result, x = two_schemes(), images()
    simulated = result.simulated_program
    for site in result.program[Sites].sites:
        grid = result.program[WeightGrids].at(site.name, WeightFormat(5, "two-scheme"))
        assert grid.levels is not None
        counts = [len(torch.unique(row)) for row in grid.levels]
        assert sum(count == 256 for count in counts) <= len(counts) / 4
        assert set(counts) <= {15, 16, 256}
    assert any(node.op == "call_module" for node in simulated.module.graph.nodes)
    found, wanted = fxquant.lower(result, "fx_int8")(x), result.simulated(x).detach()
    assert float((found - wanted).abs().max()) < float(wanted.abs().max()) / 100


def test_a_saved_result_has_the_same_levels(tmp_path: Path) -> None:
    result = planned()
    result.save(tmp_path / "saved")
    again = fxquant.load(tmp_path / "saved")
    assert {name: choice.label for name, choice in again.allocation.choices.items()} == PLAN
    assert torch.equal(again.simulated(images()), result.simulated(images()))
    assert again.program[WeightGrids].at("body", WeightFormat(2, "codebook")).levels is not None


def test_a_plan_file_with_formats_is_read_back(tmp_path: Path) -> None:
    planned().allocation.to_json(tmp_path / "plan.json")
    assert fxquant.BitAllocation.from_json(tmp_path / "plan.json").choices == planned().allocation.choices


@pytest.mark.parametrize(
    ("bits", "match"),
    [
        (("5c",), r"weight bits 5 are out of range; codebook has 1\.\.4"),
        (("2.5",), "uniform has"),
        (("2x",), "is not understood; write bits and a kind"),
    ],
)
def test_a_format_that_there_is_not_is_refused_at_once(bits: tuple[str, ...], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        fxquant.quantize(Net(), images(), fxquant.Budget(average_bits=4), bits=bits)
