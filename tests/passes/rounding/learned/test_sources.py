"""Values kept whole, kept in half the bytes, or computed again: the same values in all three."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.core.ir import Sites
from fxquant.core.run import cut_span
from fxquant.passes.rounding.learned import RUN, Source, Unit, find_units, kept_bytes, kept_type
from tests import scoring
from tests.passes.rounding.learned.test_units import long_skips

COUNT = RUN + 9
"""Images: more than run at a time."""
KEEPS = [torch.float32, torch.bfloat16, None]


def units(name: str) -> tuple[Unit, ...]:
    program = scoring.simulated(name)
    return find_units(program.module, program[Sites].sites)


def images(name: str) -> dict[str, Tensor]:
    starts = [node.name for node in scoring.simulated(name).module.graph.nodes if node.op == "placeholder"]
    return dict(zip(starts, scoring.inputs(name, COUNT), strict=True))


def walked(name: str, keep: torch.dtype | None, until: int) -> tuple[Source, Unit]:
    """Return a source behind this many units, and the next unit."""
    source, every = Source(images(name), keep), units(name)
    for index, unit in enumerate(every[:until]):
        needed = {value for later in every[index + 1 :] for value in later.inputs}
        source.advance(cut_span(scoring.simulated(name).module, unit.nodes, unit.outputs, True), needed)
    return source, every[until]


@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize("name", ["residual", "attention", "tokens"])
def test_values_are_those_of_the_graph_whatever_is_kept(name: str, keep: torch.dtype | None) -> None:
    index = torch.tensor([3, COUNT - 1, 0, 3])
    for until in range(len(units(name))):
        source, unit = walked(name, keep, until)
        assert len(source) == COUNT
        taken = source.take(unit.inputs, index)
        whole = images(name)
        for before in units(name)[:until]:
            whole |= cut_span(scoring.simulated(name).module, before.nodes, before.outputs, True)(whole)
        assert list(taken) == list(unit.inputs)
        for value in unit.inputs:
            assert taken[value].dtype == whole[value].dtype
            # Bfloat16 has 8 bits, and what it is off moves some values behind by a step of their grid.
            error = (taken[value].double() - whole[value][index].double()).norm() / whole[value].double().norm()
            assert float(error) <= (0.03 if keep is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("keep", [torch.float32, torch.bfloat16])
def test_values_that_no_later_unit_reads_are_dropped(keep: torch.dtype) -> None:
    source, unit = walked("residual", keep, 3)
    source.take(unit.inputs, torch.arange(2))
    with pytest.raises(KeyError):
        source.take(["x"], torch.arange(2))


@pytest.mark.parametrize("keep", KEEPS, ids=str)
def test_outputs_are_given_where_something_is_kept(keep: torch.dtype | None) -> None:
    source, unit = walked("residual", keep, 1)
    span = cut_span(scoring.simulated("residual").module, unit.nodes, unit.outputs, False)
    made = source.outputs(span)
    assert (made is None) == (keep is None)
    if made is not None:
        expected = span(source.take(unit.inputs, torch.arange(COUNT)))
        assert all(value.dtype == keep for value in made.values())
        assert all(torch.allclose(made[n].float(), expected[n], rtol=0.01, atol=1e-3) for n in unit.outputs)
        assert source.take(unit.inputs, torch.arange(2)).keys() == set(unit.inputs), "outputs do not move the cut"


def test_kept_bytes_count_the_values_of_the_widest_cut() -> None:
    module, found = scoring.simulated("plain").module, units("plain")
    # conv1 reads 3x6x6 and gives 6x6x6; the block gives 5x4x4; fc gives 4.
    sizes = [(3 * 36, 6 * 36), (6 * 36, 5 * 16), (5 * 16, 4)]
    for copies in (2, 3):
        expected = max(4 * (copies * read + given) for read, given in sizes) * 10
        assert kept_bytes(module, found, 10, copies) == expected


def test_kept_bytes_count_what_only_later_units_read() -> None:
    program = long_skips(6)
    found = find_units(program.module, program[Sites].sites)
    deepest = next(unit for unit in found if unit.name == "down.2")
    # One value of its own, and the two that it leads past; each is 4x6x6.
    assert len(deepest.inputs) == 1
    assert kept_bytes(program.module, found, 1, 1) >= 4 * 4 * 36 * 3


def test_values_are_kept_in_the_widest_type_that_fits() -> None:
    kept = [torch.float32, torch.bfloat16, torch.bfloat16, None]
    assert [kept_type(100, limit) for limit in (100, 99, 50, 49)] == kept
