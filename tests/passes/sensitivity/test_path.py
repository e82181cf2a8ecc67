from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from fxquant import flow
from fxquant.capture import capture
from fxquant.core.facts import Settings
from fxquant.core.ir import Choice, Program
from fxquant.core.run import CalibrationSet
from fxquant.passes import simulate, widest_plan
from fxquant.passes.sensitivity import ESTIMATORS, Batch, Scorer, attribution, formats, measure_singles, walk
from tests.models import Composed
from tests.scoring import full_forward, inputs, scorer, simulated

diagonal = ESTIMATORS["diagonal"]
path = ESTIMATORS["path"]
IMAGES = CalibrationSet(inputs("plain", 6))


@cache
def captured_apart() -> Program:
    """Return two layers that write different halves of the output: squared errors add up exactly."""
    torch.manual_seed(7)
    layers = {"a": nn.Linear(8, 5), "b": nn.Linear(8, 5)}
    net = Composed(lambda net, x: torch.cat([net.a(x[:, :8]), net.b(x[:, 8:])], dim=1), **layers)
    return capture(net.eval(), inputs("split", 2))


def apart(**pins: Choice) -> Scorer:
    images = CalibrationSet(inputs("split", 6))
    settings = Settings(bits=(2, 4, 8), pins=pins, target="reference", estimators=("gram",))
    program = flow.prepare(captured_apart(), settings)
    program = flow.calibrate(program, images)
    return scorer(simulate(program, widest_plan(program), round_biases=False), images, "mse")


def test_where_losses_add_up_the_attribution_is_the_single_loss() -> None:
    each = apart()
    found, alone = path(each), np.diag(diagonal(each).values)
    ceiling = found.notes["ceiling"]
    assert ceiling == pytest.approx(1.05)
    for plan in formats(each):
        loss = alone[plan].sum()
        expected = -np.log(1 - loss / ceiling) * alone[plan] / loss
        # The loss is a polynomial of degree 4 on the way, and two points integrate its slope exactly.
        np.testing.assert_allclose(np.diag(found.values)[plan], expected, rtol=2e-4)
    assert found.notes["quadrature_error"] < 1e-5
    assert found.unit == "coverage (-log)"


@pytest.mark.parametrize("widths", [(8,), (4, 8)])
@pytest.mark.parametrize("name", ["plain", "shared", "residual", "two_inputs"])
def test_attributions_add_up_to_the_loss(name: str, widths: tuple[int, ...]) -> None:
    each = scorer(simulated(name, (4, 8), widths), CalibrationSet(inputs(name, 12)))
    found = path(each)
    plan, ceiling = formats(each)[-1], found.notes["ceiling"]
    with torch.no_grad():
        whole = {n: r for k in plan for n, r in each.columns[k].substitution.items()}
        answer, _ = each.replay.forward(each.images.inputs, {**each.off, **whole})
        reference, _ = each.replay.forward(each.images.inputs, each.off)
    p, q = (torch.log_softmax(y.double(), dim=1) for y in (reference, answer))
    loss = float((p.exp() * (p - q)).sum(1).mean())
    widest = {c.site: c.choice for c in found.candidates if c.choice == max(x.choice for x in found.candidates)}
    assert found.predict(widest) == pytest.approx(-np.log(1 - loss / ceiling), rel=1e-3)
    assert found.notes["quadrature_error"] < 0.02


def test_attributions_are_not_scaled_into_place() -> None:
    """Before they are scaled to the loss, they must add up to it: on two readers of one value, on several images."""
    each = scorer(simulated("plain"), IMAGES)
    assert path(each).notes["quadrature_error"] < 0.05
    plans = formats(each)
    seen = walk(each, Batch(0, IMAGES), plans)
    for plan, phi, losses in zip(plans, seen["phi"], seen["losses"], strict=True):
        assert phi.shape == (len(plan), 6)
        assert phi.sum() == pytest.approx(losses.sum(), rel=0.15)


def test_small_losses_are_shared_out_by_rows_of_the_gram_matrix() -> None:
    each = scorer(simulated("split", (4, 8)), CalibrationSet(inputs("split", 6)))
    found, gram = path(each), measure_singles(each).gram / 2
    plan = formats(each)[-1]
    shares = gram[np.ix_(plan, plan)].sum(axis=1)
    np.testing.assert_allclose(np.diag(found.values)[plan] * found.notes["ceiling"], shares, rtol=0.02)


def test_the_ceiling_is_above_every_loss_that_was_seen() -> None:
    each = scorer(simulated("plain"), IMAGES)
    found, seen = path(each), walk(each, Batch(0, IMAGES), formats(each))
    p = torch.softmax(full_forward("plain", 6).double(), dim=1)
    uniform = (p * (p.log() + np.log(4))).sum(1).numpy()
    np.testing.assert_allclose(seen["flat"], uniform, rtol=1e-5)
    worst = max(losses.mean() for losses in seen["losses"])
    assert found.notes["ceiling"] == pytest.approx(1.05 * max(worst, uniform.mean()))


def test_formats_are_ranked_by_width() -> None:
    each = scorer(simulated("plain", (2, 4), (4, 8)), IMAGES)
    plans = formats(each)
    assert len(plans) == 2
    for k, plan in enumerate(plans):
        chosen = [each.columns[c] for c in plan]
        assert [column.owner for column in chosen] == list(dict.fromkeys(each.owners))
        assert {column.weight_bits for column in chosen if column.site} == {(2, 4)[k]}
        assert {column.activation_bits for column in chosen if column.site is None} == {(4, 8)[k]}


def test_an_owner_with_fewer_choices_has_its_share_of_the_first_format() -> None:
    each = apart(a=Choice(8, 8))
    found, plans = path(each), formats(each)
    assert len(plans) == 3
    seen = walk(each, Batch(0, each.images), plans)
    share = attribution(seen["phi"][0].mean(axis=1), seen["losses"][0].mean(), found.notes["ceiling"])
    assert np.diag(found.values)[plans[0]] == pytest.approx(share)


def test_coverage_by_hand() -> None:
    found = attribution(np.array([3.0, -1.0, 1.0]), np.array(0.5), 1.0)
    np.testing.assert_allclose(found, np.log(2) * np.array([0.75, 0.0, 0.25]))
    assert not attribution(np.array([-1.0, 0.0]), np.array(0.5), 1.0).any()
    assert not attribution(np.array([1.0]), np.array(-0.5), 1.0).any()


def test_the_jackknife_of_a_small_loss_is_its_standard_error() -> None:
    each = scorer(simulated("split", (8,)), CalibrationSet(inputs("split", 8)))
    found = path(each)
    # One owner's share of a loss far below the ceiling is nearly its own part of each image's loss.
    seen = walk(each, Batch(0, each.images), formats(each))
    spread = seen["phi"][0].std(axis=1, ddof=1) / 8**0.5 / found.notes["ceiling"]
    np.testing.assert_allclose(np.diag(found.stderr), spread, rtol=0.05)
