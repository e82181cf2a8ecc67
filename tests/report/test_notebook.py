"""What a notebook and a prompt show of results, plans and scores."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np

from fxquant import BitAllocation, Choice
from fxquant.core.facts import SensitivityMatrix
from fxquant.core.ir import Candidate
from fxquant.report import one_line, page
from tests.small import small_result

HOSTILE = "</table><script>alert('x')</script>\"onload=\"\x1b[2J"


def plan_of(name: str) -> BitAllocation:
    return BitAllocation({name: Choice(4, 8)}, estimator=name)


def matrix_of(name: str) -> SensitivityMatrix:
    candidates = (Candidate(name, Choice(2, 8)), Candidate(name, Choice(4, 8)), Candidate("other", Choice(4, 8)))
    values = np.diag([0.5, 0.125, 0.25])
    return SensitivityMatrix(candidates, values, np.zeros((3, 3)), name, 7.0, "KL nats")


def test_a_prompt_shows_one_line() -> None:
    result = small_result()
    shown = repr(result)
    assert shown == one_line(result.program)
    assert re.fullmatch(
        r"Result\(3 of 3 layers quantized, [\d.]+ k?B \([\d.]+ of float\), [\d.]+ stored bits a weight, "
        r"measured loss [\d.e-]+ KL nats, \w+\)",
        shown,
    )
    assert repr(small_result(budget=None)).endswith(", manual)")
    assert "2 of 3" not in shown
    assert "of 4 layers quantized" in repr(small_result(network="product"))


def test_a_plan_and_scores_show_one_line() -> None:
    result = small_result()
    shown = repr(result.allocation)
    assert shown.startswith("BitAllocation(3 layers: ")
    assert result.allocation.summary() in shown
    assert "nan" in repr(plan_of("a"))
    assert repr(matrix_of("gram")) == ("SensitivityMatrix(gram: 3 candidates of 2 layers, KL nats, 7 passes)")


def test_a_notebook_shows_tiles_and_layers() -> None:
    result = small_result()
    made = result._repr_html_()
    assert made == page(result.program, held_out_images=6)
    for shown in ("Layers quantized", "3 of 3", "Stored bits per weight", *result.allocation.choices):
        assert shown in made
    cells = re.findall(r"<tr><td>(\w+)</td><td>\w+</td><td>(\w+)</td>", made)
    assert dict(cells) == {name: choice.label for name, choice in result.allocation.choices.items()}
    assert not re.search(r"https?://|url\(|@import|src=|<script", made)


def test_a_notebook_shows_a_plan() -> None:
    plan = small_result().allocation
    made = plan._repr_html_()
    assert all(f"<td>{name}</td><td>{choice.label}</td>" in made for name, choice in plan.choices.items())
    assert "average_bits" in made
    assert "of 5<" in made
    bare = plan_of("a")
    assert math.isnan(bare.objective)
    assert "nan" not in bare._repr_html_()


def test_a_notebook_shows_losses_by_precision() -> None:
    made = matrix_of("gram")._repr_html_()
    assert "<th>W2A8</th><th>W4A8</th>" in made
    assert "<td>gram</td><td>0.5</td><td>0.125</td>" in made
    # A layer without a choice has no loss there.
    assert "<td>other</td><td></td><td>0.25</td>" in made


def test_hostile_names_are_text() -> None:
    for html in (plan_of(HOSTILE)._repr_html_(), matrix_of(HOSTILE)._repr_html_()):
        assert "<script" not in html
        assert '"onload' not in html
        assert html.isprintable()
    limited = replace(plan_of(HOSTILE), used={HOSTILE: 1.0}, limits={HOSTILE: 2.0})
    assert (repr(limited) + repr(matrix_of(HOSTILE))).isprintable()
