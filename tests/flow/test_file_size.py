from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest

import fxquant
from fxquant import Budget, Result
from fxquant.core.errors import InfeasibleBudgetError, OptionError
from fxquant.core.facts import BitAllocation, CostTables
from fxquant.core.ir import Choice, Program, Sites
from fxquant.flow import file_size, measure_file
from fxquant.passes import uniform_plans
from tests.small import images, small, small_result

pytest.importorskip("onnx")


@cache
def scored() -> Result:
    return fxquant.quantize(small(), images(), None, effort="fast", progress=False)


@cache
def measured() -> Program:
    return measure_file(scored().program)


def test_the_table_has_the_bytes_of_every_uniform_plan_and_of_float(tmp_path: Path) -> None:
    table = measured()[CostTables]["file"]
    for choices in uniform_plans(measured()[Sites].sites).values():
        made = scored().with_plan(BitAllocation(choices)).to_onnx(tmp_path / "model.onnx")
        assert table.of(choices) == pytest.approx(made.bytes, abs=0.5)
    fxquant.export_onnx(scored().program, tmp_path / "float.onnx")
    assert table.float_cost == (tmp_path / "float.onnx").stat().st_size


@pytest.mark.parametrize(("name", "unit"), [("file_mb", 1e6), ("file_ratio", None)])
def test_the_file_that_is_written_keeps_the_limit(name: str, unit: float | None, tmp_path: Path) -> None:
    table = measured()[CostTables]["file"]
    unit = table.float_cost if unit is None else unit
    limit = table.of(dict.fromkeys(("stem", "body", "head"), Choice(4, 8))) / unit
    result = fxquant.quantize(small(), images(), {name: limit}, effort="fast", progress=False)
    written = result.to_onnx(tmp_path / "model.onnx").bytes
    assert result.allocation.used[name] * unit == pytest.approx(written)
    assert 0.9 * limit < written / unit <= limit
    assert result.allocation.limits == {name: limit}
    loaded = fxquant.load(result.save(tmp_path / "saved"))
    assert loaded.costs["file"].of(result.allocation.choices) == pytest.approx(
        result.costs["file"].of(result.allocation.choices)
    )


def test_a_file_that_is_larger_than_predicted_is_solved_again_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    true, limit = file_size.file_bytes, 1.0001 * measured()[CostTables]["file"].of(scored().allocation.choices)
    solved: list[float] = []

    def larger(program: Program, plan: BitAllocation) -> int:
        solved.append(true(program, plan))
        return int(solved[-1] + 20)

    monkeypatch.setattr(file_size, "file_bytes", larger)
    known = replace(scored(), program=measured())
    plan = fxquant.resolve(known, {"file_mb": limit / 1e6}, progress=False).allocation
    assert solved[0] + 20 > limit >= solved[-1] + 20 == pytest.approx(plan.used["file_mb"] * 1e6)
    assert (plan.status, plan.limits) == ("measured", {"file_mb": limit / 1e6})
    assert math.isnan(plan.bound)
    monkeypatch.setattr(file_size, "file_bytes", lambda *_: 10**6)
    with pytest.raises(InfeasibleBudgetError, match=r"no plan was found whose file keeps .*took 1000000 bytes"):
        fxquant.resolve(known, {"file_mb": limit / 1e6}, progress=False)


def test_the_smallest_file_that_keeps_the_answers() -> None:
    plan = fxquant.resolve(scored(), "disagreement=1,minimize=file_ratio", progress=False).allocation
    table, sites = measured()[CostTables]["file"], measured()[Sites].sites
    # Not at two bits: a layer of a hundred weights saves less than the ops take that unpack it.
    names = [site.name for site in sites]
    every = [dict(zip(names, picked, strict=True)) for picked in product(*(site.choices for site in sites))]
    assert table.of(plan.choices) == pytest.approx(min(map(table.of, every)))
    assert plan.asked == {"disagreement": 1.0, "minimize": "file_ratio"}
    # Layers of one width share what unpacks them, which weighs in a file of two kilobytes.
    assert plan.used["file_ratio"] == pytest.approx(table.of(plan.choices) / table.float_cost, rel=0.05)


def test_a_file_out_of_reach_is_refused_before_the_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_file = small_result()
    monkeypatch.setattr(fxquant.flow, "measure_sensitivity", lambda *_: pytest.fail("scored first"))
    with pytest.raises(InfeasibleBudgetError, match=r"file_mb=1e-06 \(reachable: "):
        fxquant.quantize(small(), images(), Budget(file_mb=1e-6), effort="fast", progress=False)
    with pytest.raises(OptionError, match="the target 'reference' has no file that file_mb and file_ratio could limit"):
        fxquant.quantize(small(), images(), Budget(file_mb=1), target="reference", progress=False)
    with pytest.raises(OptionError, match="limit size_mb"):
        fxquant.resolve(without_a_file, "file_ratio=0.5", progress=False)
