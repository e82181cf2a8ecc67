"""The page that adds an op, done as it says: one row in the op table and one in the lowering table of fx_int8."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import fxquant
from fxquant.backends.int8 import INTEGER_OPS, FxInt8Backend
from fxquant.core.ir import OPS, QuantizedEdges
from fxquant.parity import check
from fxquant.result import Result
from tests.small import images, small
from tests.test_docs import runnable

SUB = torch.ops.aten.sub.Tensor


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """Run the blocks of the page, and take its rows out again."""
    kept: list[tuple[dict[Any, Any], dict[Any, Any]]] = [(table, dict(table)) for table in (OPS, INTEGER_OPS)]
    assert SUB not in OPS
    space: dict[str, Any] = {"model": small(), "calibration": images(24), "images": images(3)}
    for code in runnable("add-an-op.md"):
        exec(compile(code, "docs/add-an-op.md", "exec"), space)
    assert [len(table) - len(before) for table, before in kept] == [1, 1], "one row in each table"
    yield space
    for table, before in kept:
        table.clear()
        table.update(before)


def difference(result: Result) -> str:
    """Return the name of the node that subtracts."""
    (name,) = (node.name for node in result.program.module.graph.nodes if node.target is SUB)
    return str(name)


def test_without_the_rows_it_stays_in_float(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPS, SUB)
    monkeypatch.delitem(INTEGER_OPS, "sub")
    budget = fxquant.Budget(average_bits=8)
    result = fxquant.quantize(page["edges"], images(24), budget, effort="fast", target="fx_int8", progress=False)
    assert result.program[QuantizedEdges].float_reasons[difference(result)] == "the op table has no row for it"


@pytest.mark.parametrize("target", ["reference", "fx_int8"])
def test_with_the_rows_it_runs_on_integers(page: dict[str, Any], target: str) -> None:
    result: Result = page["results"][target]
    assert difference(result) in result.program[QuantizedEdges].integer_nodes
    assert difference(result) not in result.program[QuantizedEdges].float_reasons


def test_its_kernel_computes_the_bits_of_the_exact_reference(page: dict[str, Any]) -> None:
    result: Result = page["results"]["fx_int8"]
    lowered = FxInt8Backend().lower(result.simulated)
    assert sum(isinstance(module, page["IntegerSub"]) for module in lowered.modules()) == 1
    exact = next(pair for pair in check(result, images(24), ("fx_int8",)).pairs if pair.reference == "exact")
    assert exact.max_step == exact.layer_step == 0.0


def test_a_backend_without_a_row_says_why_and_writes_it_in_float(page: dict[str, Any], tmp_path: Path) -> None:
    result: Result = page["results"]["onnxruntime"]
    reason = result.program[QuantizedEdges].float_reasons[difference(result)]
    assert reason == "target 'onnxruntime' has no integer kernel for sub"
    path = tmp_path / "edges.onnx"
    result.to_onnx(path)
    session = onnxruntime.InferenceSession(path)
    made = session.run(None, {session.get_inputs()[0].name: images(3).numpy()})[0]
    step = float(result.simulated(images(3)).detach().abs().max()) / 255
    torch.testing.assert_close(torch.from_numpy(made), result.simulated(images(3)), rtol=0, atol=2 * step)
