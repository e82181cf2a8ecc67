"""Distribution correction: a sum over images, which lets statistics come nearer to those of the training set."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.capture import capture
from fxquant.core.facts import NormStatistics, Statistics
from fxquant.core.ir import Program, nodes_by_name
from fxquant.core.run import GraphReplay, Span, cut_span, varying_nodes
from fxquant.passes import Canonicalize, FoldBatchnorm
from fxquant.passes.rounding.learned import corrected_inputs, has_statistics, mismatch
from tests.models import MODELS, Composed
from tests.programs import captured, folded

STEPS = 25


def unit(program: Program) -> tuple[Span, dict[str, Statistics]]:
    """Return the whole network up to its folded ops, and what was known of them."""
    known = program[NormStatistics].folded
    nodes = [node.name for node in varying_nodes(program.module.graph)]
    return cut_span(program.module, nodes, known, quantized=False), known


def images(count: int = 8) -> dict[str, Tensor]:
    return {"x": MODELS["residual"].inputs(count)[0] * 2 + 0.5}


def objective(x: Tensor, weight: float) -> Tensor:
    """Return the published objective of each image, on the network before folding, where its terms can be read."""
    program = Canonicalize()(captured("residual"))
    _, environment = GraphReplay(program.module).forward((x,))
    state = program.module.state_dict()
    total = weight * (x - images(len(x))["x"]).square().sum(dim=1).mean(dim=(1, 2))
    for number, op in enumerate(unit(folded("residual"))[1], 1):
        a = environment[nodes_by_name(program.module.graph)[op]]
        mean, variance = (state[f"bn{number}.running_{kind}"] for kind in ("mean", "var"))
        total = total + (mean - a.mean(dim=(2, 3))).square().sum(dim=1)
        total = total + (torch.sqrt(variance + 1e-6) - torch.sqrt(a.var(dim=(2, 3)) + 1e-6)).square().sum(dim=1)
    return total


@cache
def result(batch: int, weight: float = 50.0) -> Tensor:
    span, known = unit(folded("residual"))
    return corrected_inputs(span, images(), known, STEPS, weight, batch)["x"]


def test_a_large_batch_equals_small_ones() -> None:
    moved = (result(8) - images()["x"]).norm()
    assert float(moved) > 0.1
    assert float((result(8) - result(2)).norm()) < 1e-3 * float(moved)


def test_the_published_objective_falls_for_every_image() -> None:
    before, after = objective(images()["x"], 50.0), objective(result(8), 50.0)
    assert bool((after < before).all())


def test_mismatches_are_those_of_the_network_before_folding() -> None:
    span, known = unit(folded("residual"))
    found = sum(float(mismatch(value, known[name])) for name, value in span(images()).items())
    assert found == pytest.approx(float(objective(images()["x"], 0.0).detach().mean()), rel=1e-4)


def test_the_first_step_goes_down_the_published_gradient() -> None:
    span, known = unit(folded("residual"))
    x = images()["x"].requires_grad_(True)
    (gradient,) = torch.autograd.grad(objective(x, 0.0).mean(), x)
    # Adam's first step is the sign of the gradient times the rate.
    stepped = corrected_inputs(span, images(), known, 1, 50.0, 8)["x"] - images()["x"]
    clear = gradient.abs() > gradient.abs().median()
    assert torch.allclose(stepped[clear], -1e-3 * gradient[clear].sign(), rtol=1e-2, atol=2e-6)


def test_the_weight_holds_inputs_where_they_were() -> None:
    free, held = ((result(8, weight) - images()["x"]).norm() for weight in (0.0, 5000.0))
    assert float(held) < 0.5 * float(free)


def test_channels_whose_factor_is_zero_say_nothing() -> None:
    span, known = unit(folded("residual"))
    dead = {
        name: replace(each, factor=torch.cat([torch.zeros(1), each.factor[1:]]), mean=each.mean + 100 * torch.eye(8)[0])
        for name, each in known.items()
    }
    made = corrected_inputs(span, images(), dead, STEPS, 50.0, 8)["x"]
    assert bool(torch.isfinite(made).all())
    assert float((made - images()["x"]).abs().max()) < 0.05


def test_values_of_one_position_have_no_deviation() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = torch.relu(net.bn(net.conv(x))).mean(dim=(2, 3), keepdim=True)
        answer: Tensor = net.bn_fc(net.fc(torch.relu(net.bn_one(net.one(x))).flatten(1)))
        return answer

    torch.manual_seed(0)
    layers = {
        "conv": nn.Conv2d(3, 4, 3),
        "bn": nn.BatchNorm2d(4),
        "one": nn.Conv2d(4, 4, 1),
        "bn_one": nn.BatchNorm2d(4),
    }
    net = Composed(forward, **layers, fc=nn.Linear(4, 5), bn_fc=nn.BatchNorm1d(5))
    program = FoldBatchnorm()(Canonicalize()(capture(net.eval(), (torch.randn(2, 3, 6, 6),))))
    known = program[NormStatistics].folded
    assert len(known) == 3
    graph = nodes_by_name(program.module.graph)
    assert [has_statistics(graph[name]) for name in known] == [True, False, False]


def test_integers_stay_as_they_are() -> None:
    span, known = unit(folded("residual"))
    whole = Span(lambda x: span.module(x.float()), span.inputs, span.sizes, span.outputs)
    x = {"x": images()["x"].round().long()}
    assert corrected_inputs(whole, x, known, 3, 50.0, 8)["x"].equal(x["x"])
