"""Targets follow from the rows of the lowering tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxquant.backends import KernelRow, backend, target_of
from fxquant.backends.int8 import INTEGER_OPS
from fxquant.core.errors import OptionError
from fxquant.core.facts import Target
from fxquant.core.ir import OPS, OpRule, ScaleRule


def made(rows: dict[str, KernelRow]) -> Target:
    return target_of("test", rows, (8,), (8,), {8: 8})


def test_every_column_of_a_row_is_a_fact_of_the_target() -> None:
    target = made(
        {
            "conv": KernelRow("QConv", writes_integers=True, adds_operand=True),
            "linear": KernelRow("QLinear"),
            "add": KernelRow("QAdd"),
            "max_pool": KernelRow("QMax"),
            "mul": KernelRow(refuse="slow"),
        }
    )
    assert target.kernels == {"conv": "QConv", "linear": "QLinear"}
    assert target.joins == {"add"}, "an op that keeps the grid takes part without asking"
    assert target.output_quantized == target.fused_sums == {"conv"}
    assert target.refuse_joins == {"mul": "slow"}
    assert target.products == set()
    assert made({"matmul": KernelRow("QMatMul")}).products == {"matmul"}


def test_a_row_for_no_op_is_refused() -> None:
    with pytest.raises(OptionError, match=r"rows for frobnicate, which no op .* add the op to OPS first"):
        made({"frobnicate": KernelRow("none")})


def test_rows_added_later_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "div" not in backend("reference").target.joins
    monkeypatch.setitem(OPS, torch.ops.aten.div.Tensor, OpRule("div", ScaleRule.OWN, (0, 1)))
    assert "div" in backend("reference").target.joins
    assert "div" not in backend("fx_int8").target.joins
    monkeypatch.setitem(INTEGER_OPS, "div", replace(INTEGER_OPS["add"], kernel="division"))
    assert "div" in backend("fx_int8").target.joins
