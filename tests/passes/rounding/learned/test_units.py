"""Where networks are cut: golden units of networks that hold one difficulty each."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from fxquant import flow
from fxquant.capture import capture
from fxquant.core.errors import OptionError
from fxquant.core.facts import Settings
from fxquant.core.ir import Program, Sites
from fxquant.core.run import CalibrationSet, varying_nodes
from fxquant.passes import simulate, widest_plan
from fxquant.passes.rounding.learned import LARGEST, Unit, find_units
from tests import scoring
from tests.models import MODELS

NAMES = [name for name in MODELS if name != "weightless"]


class LongSkips(nn.Module):
    """A network shaped like a U: what goes down is read again on the way up, so that no single value is a cut."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth))
        self.up = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(depth))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        skips = []
        for layer in self.down:
            skips.append(x)
            x = torch.relu(layer(x))
        for layer in self.up:
            x = torch.relu(layer(torch.cat([x, skips.pop()], dim=1)))
        answer: Tensor = self.head(x)
        return answer


@cache
def long_skips(depth: int) -> Program:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 6, 6)
    program = flow.prepare(capture(LongSkips(depth).eval(), (images[:2],)), Settings(target="reference"))
    program = flow.calibrate(program, CalibrationSet((images,)))
    return simulate(program, widest_plan(program), round_biases=False)


def units(program: Program, granularity: str = "block") -> tuple[Unit, ...]:
    return find_units(program.module, program[Sites].sites, granularity)


def sites(name: str, granularity: str = "block") -> list[tuple[str, ...]]:
    return [unit.sites for unit in units(scoring.simulated(name), granularity)]


@pytest.mark.parametrize("granularity", ["layer", "layers:2", "block", "2", "stage", "network"])
@pytest.mark.parametrize("name", NAMES)
def test_every_varying_node_is_in_exactly_one_unit(name: str, granularity: str) -> None:
    program = scoring.simulated(name)
    found = units(program, granularity)
    assert [node for unit in found for node in unit.nodes] == [n.name for n in varying_nodes(program.module.graph)]
    assert all(unit.sites and unit.name == unit.sites[0] for unit in found)
    assert {site for unit in found for site in unit.sites} == {site.name for site in program[Sites].sites}


@pytest.mark.parametrize("granularity", ["layer", "layers:3", "block", "stage"])
@pytest.mark.parametrize("name", NAMES)
def test_units_read_only_what_came_before(name: str, granularity: str) -> None:
    program = scoring.simulated(name)
    known = {node.name for node in program.module.graph.nodes if node.op == "placeholder"}
    for unit in units(program, granularity):
        assert set(unit.inputs) <= known
        assert set(unit.outputs) <= set(unit.nodes)
        known |= set(unit.outputs)
    assert {node.name for node in program.module.graph.output_node().all_input_nodes} <= known


GOLDEN: dict[str, list[tuple[str, ...]]] = {
    # The branches of a residual add belong together, stem and classifier stand alone.
    "residual": [("conv1",), ("conv2",), ("conv3",), ("fc",)],
    "plain": [("conv1",), ("conv2", "conv3"), ("fc",)],
    # The two halves of a transformer block.
    "attention": [("patch",), ("attention.in_proj_weight", "attention.out_proj"), ("wide", "narrow"), ("head",)],
    "separable": [("stem",), ("depthwise",), ("pointwise",), ("head",)],
    "padded": [("grouped",), ("same",), ("even",), ("last",)],
    # A shared weight is in each unit that reads it.
    "shared": [("conv",), ("conv",), ("fc_b",), ("fc_b",)],
    "two_inputs": [("image", "mask", "out")],
    "concat": [("left", "right"), ("mix", "pooled")],
}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_blocks(name: str) -> None:
    assert sites(name) == GOLDEN[name]


def test_a_residual_block_reads_one_value_and_gives_one() -> None:
    stem, block, head = units(scoring.simulated("plain"))
    assert (block.inputs, block.outputs) == (stem.outputs, head.inputs)
    assert len(block.inputs) == len(block.outputs) == 1
    assert "add_25" in block.outputs


def test_a_value_is_not_parted_from_its_clip_and_its_quantizer() -> None:
    for name in ("residual", "separable", "name_clash"):
        starts = {unit.nodes[0] for unit in units(scoring.simulated(name))[1:]}
        assert not any(start.startswith(("quantize_", "relu")) for start in starts)


@pytest.mark.parametrize(
    ("name", "granularity", "pieces"),
    [
        ("plain", "layer", [("conv1",), ("conv2",), ("conv3",), ("fc",)]),
        ("plain", "1", GOLDEN["plain"]),
        ("plain", "2", [("conv1", "conv2", "conv3"), ("fc",)]),
        ("plain", "99", [("conv1", "conv2", "conv3", "fc")]),
        # Where the values that cross cannot be kept, a piece has more layers than asked for.
        (
            "attention",
            "layers:2",
            [("patch", "attention.in_proj_weight", "attention.out_proj"), ("wide", "narrow"), ("head",)],
        ),
        ("two_inputs", "network", [("image", "mask", "out")]),
        # Stages end where the image size changes.
        ("padded", "stage", [("grouped", "same", "even"), ("last",)]),
        ("residual", "stage", [("conv1", "conv2", "conv3"), ("fc",)]),
    ],
)
def test_other_granularities(name: str, granularity: str, pieces: list[tuple[str, ...]]) -> None:
    assert sites(name, granularity) == pieces


def test_layers_are_not_cut_where_values_have_no_axis_of_images() -> None:
    # Between the projections of an attention images and heads share an axis.
    assert sites("attention", "layer")[0] == ("patch", "attention.in_proj_weight", "attention.out_proj")
    assert sites("attention", "stage")[-1] == ("head",)


class PairNet(nn.Module):
    """Residual blocks of two convolutions each, the first of them without a stem."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(6))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for k in range(0, 6, 2):
            x = torch.relu(x + self.layers[k + 1](torch.relu(self.layers[k](x))))
        answer: Tensor = self.head(x.mean(dim=(2, 3)))
        return answer


@cache
def pairs() -> Program:
    torch.manual_seed(0)
    images = torch.randn(4, 4, 6, 6)
    program = flow.prepare(capture(PairNet().eval(), (images[:2],)), Settings(target="reference"))
    return simulate(flow.calibrate(program, CalibrationSet((images,))), widest_plan(program), round_biases=False)


def test_neighbouring_layers_between_one_layer_and_one_block() -> None:
    program = pairs()
    # k = 1 is layer-wise reconstruction, k = the layers of a block is BRECQ's.
    assert units(program, "layers:1") == units(program, "layer")
    two, blocks = units(program, "layers:2"), units(program, "block")
    assert [unit.sites for unit in two] == [unit.sites for unit in blocks]
    # The pooling in front of the classifier is with the block behind it, or with the layers in front.
    assert two[:2] == blocks[:2]
    names = [f"layers.{k}" for k in range(6)]
    assert [unit.sites for unit in units(program, "layers:4")] == [tuple(names[:4]), (*names[4:], "head")]
    assert units(program, "layers:7") == units(program, "network")


@pytest.mark.parametrize("name", NAMES)
def test_one_neighbouring_layer_is_one_layer(name: str) -> None:
    program = scoring.simulated(name)
    assert units(program, "layers:1") == units(program, "layer")


def test_long_skips_that_make_no_large_piece_are_left_whole() -> None:
    found = units(long_skips(3))
    assert [len(unit.sites) for unit in found] == [1, 5, 1, 1]
    assert all(len(unit.inputs) == 1 for unit in found)


def test_long_skips_are_cut_where_several_values_cross() -> None:
    found = {unit.name: unit for unit in units(long_skips(6))}
    assert list(found) == ["stem", "down.0", "down.1", "down.2", "up.3", "up.4", "up.5", "head"]
    assert max(len(unit.sites) for unit in found.values()) <= LARGEST
    # What comes from below and what comes from the side.
    assert [len(found[name].inputs) for name in ("up.4", "up.5", "head")] == [2, 2, 1]
    assert found["up.5"].inputs[1] in found["stem"].outputs


@pytest.mark.parametrize("granularity", ["blocks", "0", "-1", "1.5", "", "layers:", "layers:0"])
def test_an_unknown_granularity_is_refused_with_those_there_are(granularity: str) -> None:
    program = scoring.simulated("plain")
    with pytest.raises(OptionError, match="known: layer, block, stage, network"):
        find_units(program.module, program[Sites].sites, granularity)
