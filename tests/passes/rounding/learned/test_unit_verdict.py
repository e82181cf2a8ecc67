"""What a unit learned stays where the held-out loss or the error of its own outputs falls."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.core.run import LOSSES, cut_span, model_outputs
from fxquant.passes.rounding.learned import Cut, Judged, Source, UnitVerdict, answer_of, find_units
from tests.passes.rounding.tasks import images, task_of


@pytest.mark.parametrize(
    ("loss", "error", "kept"),
    [
        (0.9, 0.9, True),
        (0.9, 1.1, True),
        (1.1, 0.9, True),
        (1.4, 1.1, True),
        (1.6, 0.9, True),
        (1.6, 1.1, False),
        (1.6, 1.0, False),
        (math.nan, 0.9, True),
        (math.nan, math.nan, False),
        (1.4, None, True),
        (1.6, None, False),
    ],
)
def test_a_unit_is_rejected_where_it_does_much_harm(loss: float, error: float | None, kept: bool) -> None:
    before = Judged(1.0, None if error is None else 1.0)
    reason = Judged(loss, error).rejection(before, "kl")
    assert (reason == "") is kept
    assert kept or "held-out kl" in reason


def test_without_held_out_images_everything_stays() -> None:
    assert Judged().rejection(Judged(), "kl") == ""


def test_both_measures_are_those_of_the_network_quantized_up_to_the_unit() -> None:
    given, held = task_of("plain", 2), images("plain", 6)
    module = given.bare().module
    units, (x,) = find_units(module, given.sites), held.inputs
    answer = answer_of(module)
    reference = model_outputs(given.program.module, held.inputs)
    one, other = (Source({"x": x}, torch.float32) for _ in range(2))
    verdict = UnitVerdict(one, other, held, LOSSES["kl"], answer, reference)
    for index, unit in enumerate(units):
        cut = Cut(module, units, index, (answer,))
        span = cut.quantized({})
        found = verdict.judged(cut, span)
        done = [name for each in units[: index + 1] for name in each.nodes]
        behind = [name for each in units[index + 1 :] for name in each.nodes]
        ours, floats = (cut_span(module, done, unit.outputs, quantized)({"x": x}) for quantized in (True, False))
        ends = cut_span(module, behind, [answer], False)(ours)[answer] if behind else ours[answer]
        assert found.loss == pytest.approx(float(LOSSES["kl"](reference, ends, None).mean()), rel=1e-4)
        if behind:
            (name,) = unit.outputs
            squares = (ours[name] - floats[name]).square().sum(dim=1).mean()
            assert found.error == pytest.approx(float(squares), rel=1e-4)
        else:
            assert found.error is None
        verdict.advance(cut, span, [name for each in units[index + 1 :] for name in each.inputs])
