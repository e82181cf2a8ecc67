"""The fact that carries rounded tensors: what it refuses, and that files give back what was put in."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxquant.core.errors import FileFormatError, OptionError, OutputError
from fxquant.core.facts import Rounding, UnitRecord, WeightGrids
from fxquant.core.ir import Choice, Grid, QuantSpec, WeightFormat, activation_spec
from fxquant.core.storage import read_arrays, write_arrays
from tests import scoring

PLAN = {"a": Choice(4, 8), "b": Choice(2, 8)}


def example() -> Rounding:
    spec = QuantSpec(4, True, False, 0)
    grid = Grid(spec, torch.tensor([0.5, 0.25]), torch.tensor([1, -2], dtype=torch.int32))
    return Rounding(
        PLAN,
        "equalize+pdquant",
        weights={"a": torch.tensor([[0.5, -1.0], [0.25, 0.0]])},
        grids={"a": grid},
        biases={"conv:1": torch.tensor([1.0, 2.0])},
        activations={"group": Grid(activation_spec(4), torch.tensor(0.125), torch.tensor(3, dtype=torch.int32))},
        parameters={"conv.weight": torch.tensor([2.0])},
        units=(
            UnitRecord("a", "pdquant", 0.5, 0.25, True, "", 1.5, ("a", "b")),
            UnitRecord("b", "pdquant", math.nan, math.nan, False, "diverged", 0.5),
        ),
        notes=("something was left out",),
    )


def test_a_file_gives_back_every_tensor_and_record(tmp_path: Path) -> None:
    known = example()
    known.save(tmp_path / "rounding.npz")
    read = Rounding.load(tmp_path / "rounding.npz")
    assert (read.choices, read.method, read.notes) == (known.choices, known.method, known.notes)
    assert read.units[0] == known.units[0]
    assert math.isnan(read.units[1].before)
    assert replace(read.units[1], before=0.0, after=0.0) == replace(known.units[1], before=0.0, after=0.0)
    for kind in ("weights", "biases", "parameters"):
        one, other = getattr(read, kind), getattr(known, kind)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert read.grids["a"].spec == known.grids["a"].spec
    assert torch.equal(read.grids["a"].scale, known.grids["a"].scale)
    assert torch.equal(read.grids["a"].zero_point, known.grids["a"].zero_point)
    read_grid = read.activations["group"]
    assert read_grid.spec == activation_spec(4)
    assert (float(read_grid.scale), int(read_grid.zero_point)) == (0.125, 3)
    assert (read_grid.scale.shape, read_grid.zero_point.dtype) == ((), torch.int32)


def test_a_file_that_lacks_something_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rounding.npz"
    example().save(path)
    arrays = read_arrays(path)
    header = str(arrays["header"])
    for damaged in (
        {**arrays, "header": np.array(header.replace("W4A8", "W4A"))},
        {name: array for name, array in arrays.items() if name != "grid_scale:a"},
        {name: array for name, array in arrays.items() if name != "zero:group"},
    ):
        write_arrays(path, damaged)
        with pytest.raises(FileFormatError, match="not an intact rounding"):
            Rounding.load(path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        example().save(tmp_path / "file" / "rounding.npz")


def test_tensors_that_are_not_finite_and_no_plan_are_refused() -> None:
    for kind, field in (("weight", "weights"), ("bias", "biases"), ("parameter", "parameters")):
        bad: dict[str, Any] = {field: {"a": torch.tensor([1.0, math.nan])}}
        with pytest.raises(OptionError, match=f"{kind} of 'a' that is not finite"):
            Rounding(PLAN, "m", **bad)
    with pytest.raises(OptionError, match="needs the plan"):
        Rounding({}, "nearest")


@pytest.mark.parametrize(("bits", "read"), [(8, True), (4, False)])
def test_a_file_without_activation_specs_is_read_where_they_follow_from_the_plan(
    tmp_path: Path, bits: int, read: bool
) -> None:
    path = tmp_path / "rounding.npz"
    replace(example(), choices={"a": Choice(4, 8), "b": Choice(2, bits)}).save(path)
    arrays = read_arrays(path)
    write_arrays(path, {**arrays, "header": np.array(str(arrays["header"]).replace('"activation_specs"', '"other"'))})
    if read:
        assert Rounding.load(path).activations["group"].spec == activation_spec(8)
        return
    with pytest.raises(FileFormatError, match="quantize again"):
        Rounding.load(path)


def test_weights_rounded_before_the_plan_do_not_lie_on_another_grid() -> None:
    own, other = example().grids["a"], example().grids["a"]
    early, late = torch.zeros(2, 2), torch.ones(2, 2)
    grids, plain = WeightGrids({"a": {WeightFormat(4): own}}, {("a", WeightFormat(4)): early}), Rounding(PLAN, "m")
    assert plain.grid_of("a", grids) is own
    assert plain.weight_of("a", grids) is early
    moved = replace(plain, grids={"a": other})
    assert moved.grid_of("a", grids) is other
    assert moved.weight_of("a", grids) is None
    assert replace(moved, weights={"a": late}).weight_of("a", grids) is late


def test_it_holds_for_its_own_plan_alone() -> None:
    known = example()
    program = scoring.calibrated("plain").with_facts(known)
    assert Rounding.of(program, dict(PLAN)) is known
    other = Rounding.of(program, {**PLAN, "b": Choice(4, 8)})
    assert other.method == "nearest"
    assert not other.weights
    assert not other.activations
    assert Rounding.of(scoring.calibrated("plain"), PLAN) == Rounding(PLAN, "nearest")


def test_parameters_that_are_in_the_graph_stay_with_any_plan() -> None:
    known = example()
    other = Rounding.of(scoring.calibrated("plain").with_facts(known), {**PLAN, "b": Choice(4, 8)})
    assert other.parameters == known.parameters
