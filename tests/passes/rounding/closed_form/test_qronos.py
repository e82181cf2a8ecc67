"""Qronos against the paper's update on stored samples, against least squares, and on whole networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from fxquant.core.errors import FailureError, PipelineError
from fxquant.core.facts import Rounding, WeightGrids
from fxquant.core.ir import Grid, RowGrid, WeightFormat, tensor_at
from fxquant.core.run import GraphReplay
from fxquant.passes.formats import RowProblem, rows_of, squared_error
from fxquant.passes.rounding import ROUNDERS
from fxquant.passes.rounding.closed_form import (
    DAMPINGS,
    Moments,
    OutputMoments,
    aimed,
    geometry_of,
    gptq_rows,
    output_moments,
    patches,
    refitted,
    round_layerwise,
    verdict,
)
from tests.passes.rounding.tasks import correlated, images, mean_errors, op_node, task_of

conv2d = torch.ops.aten.conv2d.default


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def centred(samples: Tensor) -> Tensor:
    return samples - samples.mean(dim=1, keepdim=True)


def problem(inputs: int, rows: int, seed: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor, OutputMoments]:
    """Return weight rows, quantized inputs (groups, samples, inputs), float outputs and their moments."""
    floats = correlated(inputs, 150, seed, groups)
    ours = floats + 0.3 * seeded(*floats.shape, seed=seed) + 0.1
    weight = seeded(groups, rows, inputs, seed=seed + 1)
    y = floats @ weight.transpose(1, 2) + seeded(groups, 1, rows, seed=seed + 2)
    x, z = centred(ours), centred(y)
    moments = OutputMoments(
        x.transpose(1, 2) @ x, x.transpose(1, 2) @ z, z.square().sum(dim=1), ours.mean(dim=1), y.mean(dim=1)
    )
    return weight, ours, y, moments


def squares(values: Tensor, ours: Tensor, y: Tensor) -> Tensor:
    """Return `sum (y - q x - b)^2` at the bias b of least squares."""
    return centred(y - ours @ values.transpose(1, 2)).square().sum(dim=1)


def test_moments_are_those_of_stored_patches_whatever_the_batches() -> None:
    x, weight, bias = seeded(7, 4, 6, 5).float(), seeded(6, 2, 3, 3).float(), seeded(6).float()
    node = op_node(conv2d, x, weight, bias, (2, 1), (1, 1), (1, 1), 2)
    y = conv2d(x + 0.1, weight, bias, (2, 1), (1, 1), (1, 1), 2)
    found = output_moments(node, torch.split(x, 3), torch.split(y, 3))
    stored = torch.cat(list(patches(x, geometry_of(node))), dim=1).double()
    outputs = y.double().movedim(1, -1).reshape(-1, 2, 3).transpose(0, 1)
    a, b = centred(stored), centred(outputs)
    wanted = OutputMoments(
        a.transpose(1, 2) @ a,
        a.transpose(1, 2) @ b,
        b.square().sum(dim=1),
        stored.mean(dim=1),
        outputs.mean(dim=1),
    )
    for name in ("gram", "cross", "power", "inputs", "outputs"):
        assert torch.allclose(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-4), name
    rows = rows_of(weight, groups=2)
    assert torch.allclose(found.error(rows), squares(rows, stored, outputs), rtol=1e-3)
    left = outputs - stored @ rows.transpose(1, 2)
    assert torch.allclose(found.bias(rows), left.mean(dim=1).flatten(), atol=1e-5)
    with pytest.raises(PipelineError, match="no batch"):
        output_moments(node, [], [])


@pytest.mark.parametrize("groups", [1, 3])
def test_the_aim_is_the_ridge_solution_and_errors_count_from_there(groups: int) -> None:
    weight, ours, y, moments = problem(8, 5, 0, groups)
    target, weighed = aimed(weight, moments, 0.1)
    pull = 0.1 * moments.gram.diagonal(dim1=1, dim2=2).mean(dim=1).reshape(-1, 1, 1)

    def cost(rows: Tensor) -> Tensor:
        return squares(rows, ours, y) + (pull * (rows - weight).square()).sum(dim=2)

    root = pull.sqrt() * torch.eye(8, dtype=torch.float64)
    stacked = torch.cat([centred(ours), root], dim=1), torch.cat([centred(y), root @ weight.transpose(1, 2)], dim=1)
    assert torch.allclose(target, torch.linalg.lstsq(*stacked).solution.transpose(1, 2))
    other = weight + seeded(*weight.shape, seed=5)
    away = ((other - target) @ weighed.gram * (other - target)).sum(dim=2)
    assert torch.allclose(cost(other), cost(target) + away)


def test_without_errors_in_the_inputs_it_aims_at_the_weight_itself() -> None:
    weight, ours, _, _ = problem(6, 4, 3)
    x = centred(ours)
    gram = x.transpose(1, 2) @ x
    moments = OutputMoments(gram, gram @ weight.transpose(1, 2), torch.ones(1, 4), x[:, 0], weight[..., 0])
    for from_float in (False, True):
        assert torch.allclose(aimed(weight, moments, from_float=from_float)[0], weight)


def paper(weight: Tensor, ours: Tensor, y: Tensor, grid: RowGrid, pull: float) -> Tensor:
    """Return the paper's algorithm 1 on stored samples: each step solves its least squares problem from the start.

    A pull toward the float weight is `inputs` more samples: `sqrt(pull)` for one input each.
    """
    inputs = weight.shape[1]
    root = pull**0.5 * torch.eye(inputs, dtype=torch.float64)
    x = torch.cat([ours - ours.mean(dim=0), root])
    z = torch.cat([y - y.mean(dim=0), root @ weight.T])
    order = x.square().sum(dim=0).argsort(descending=True, stable=True).tolist()
    chosen, left = torch.zeros_like(weight), weight.clone()
    for position, t in enumerate(order):
        done, later = order[:position], order[position + 1 :]
        # Error correction: the best value of this column while all others stay.
        wanted = z - x[:, done] @ chosen[:, done].T - x[:, later] @ left[:, later].T
        best = (x[:, t] @ wanted) / (x[:, t] @ x[:, t])
        chosen[:, t] = grid.value(grid.nearest(best.reshape(1, -1, 1))).flatten()
        # Error diffusion: the best values of all later columns.
        wanted = z - x[:, [*done, t]] @ chosen[:, [*done, t]].T
        if later:
            left[:, later] = torch.linalg.lstsq(x[:, later], wanted).solution.T
    return chosen


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_papers_algorithm_on_stored_samples(bits: int, seed: int) -> None:
    weight, ours, y, moments = problem(12, 6, seed)
    grid = RowGrid.of(Grid.of_weight(weight[0], bits), 1, 6)
    pull = 0.01 * float(moments.gram.diagonal(dim1=1, dim2=2).mean())
    wanted = paper(weight[0], ours[0], y[0], grid, pull)
    target, weighed = aimed(weight, moments, 0.01, from_float=True)
    found = grid.value(gptq_rows(weighed, damping=1e-12)(target, grid))[0]
    # GPTQ's own guard, which the paper lacks, may round a row to nearest.
    same = torch.isclose(found, wanted).all(dim=1)
    assert same.sum() >= 4
    nearest = grid.value(grid.nearest(target))[0]
    assert torch.allclose(found[~same], nearest[~same])


def test_it_follows_the_outputs_better_than_gptq_and_gptq_better_than_nearest() -> None:
    weight, ours, y, moments = problem(32, 16, 7)
    grid = RowGrid.of(Grid.of_weight(weight[0], 3), 1, 16)
    target, weighed = aimed(weight, moments)
    found = [
        grid.value(grid.nearest(weight)),
        grid.value(gptq_rows(Moments(moments.gram, moments.gram))(weight, grid)),
        grid.value(gptq_rows(weighed)(target, grid)),
    ]
    assert torch.allclose(moments.error(found[2]), squares(found[2], ours, y))
    # What no values of the weight can reach is left out.
    least = squares(aimed(weight, moments, 1e-9)[0], ours, y)
    errors = [float((squares(values, ours, y) - least).sum()) for values in found]
    assert errors[2] < 0.9 * errors[1]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 6), (4, 1, 1, 1)])
def test_halves_are_moments_of_half_of_the_images(sizes: tuple[int, ...]) -> None:
    """Each batch is cut in the middle; batches of one image go to either half in turn."""
    x, y = seeded(7, 5), seeded(7, 3, seed=1)
    node = op_node(torch.ops.aten.linear.default, x, seeded(3, 5), None)
    found = output_moments(node, torch.split(x, list(sizes)), torch.split(y, list(sizes)))
    first, last, start = list[int](), list[int](), 0
    for number, size in enumerate(sizes):
        middle = start + (size // 2 or (number % 2 == 0))
        first += range(start, middle)
        last += range(middle, start + size)
        start += size
    for rows, half in zip((first, last), found.halves, strict=True):
        assert torch.allclose(half.gram, output_moments(node, [x[rows]], [y[rows]]).gram)
        assert torch.allclose(half.inputs[0], x[rows].mean(dim=0))
    assert torch.allclose(found.gram, centred(x[None]).transpose(1, 2) @ centred(x[None]))
    assert torch.allclose(found.power, centred(y[None]).square().sum(dim=1))


@pytest.mark.parametrize(("images", "few"), [(24, True), (4000, False)])
def test_the_pull_towards_the_weight_is_what_the_other_half_asks_for(images: int, few: bool) -> None:
    """Few images show little of how inputs err: values between the weight and those that fit these images lose less."""
    weight, turn = seeded(1, 4, 16, seed=2), torch.eye(16, dtype=torch.float64) + 0.1 * seeded(16, 16, seed=4)

    def errs(floats: Tensor) -> Tensor:
        return floats @ turn + 0.5 * seeded(*floats.shape, seed=len(floats))

    floats, new = seeded(images, 16, seed=3), seeded(5000, 16, seed=6)
    ours, theirs = errs(floats), errs(new)
    node = op_node(torch.ops.aten.linear.default, ours, weight[0], None)
    moments = output_moments(node, [ours], [floats @ weight[0].T])
    pulls = {damping: aimed(weight, moments, damping)[0] for damping in DAMPINGS}
    chosen = aimed(weight, moments)[0]
    (damping,) = [each for each, target in pulls.items() if torch.allclose(chosen, target)]
    assert (damping > DAMPINGS[0]) == few
    answers = (new @ weight[0].T)[None]
    lost = {each: float(squares(target, theirs[None], answers).sum()) for each, target in pulls.items()}
    assert lost[damping] <= 1.05 * min(lost.values())
    assert (lost[damping] < 0.95 * lost[DAMPINGS[0]]) == few


def test_levels_found_for_the_rows_to_round_are_better_than_the_plans() -> None:
    weight, _, _, moments = problem(32, 16, 7)
    target, weighed = aimed(weight, moments)
    for kind in ("uniform", "codebook"):
        problem_ = RowProblem(target, weighed.gram, gptq_rows(weighed))
        own = RowGrid.of(Grid.of_weight(weight[0], 2), 1, 16)
        grid, integers = refitted(problem_, own, WeightFormat(2, kind))
        error = squared_error(target - grid.value(integers), weighed.gram)
        assert float(error.sum()) < 0.9 * float(problem_.error(own).sum())


def test_moments_that_are_not_finite_are_refused() -> None:
    weight, _, _, moments = problem(4, 3, 0)
    with pytest.raises(FailureError, match="not finite"):
        aimed(weight, replace(moments, gram=moments.gram * torch.nan))


@pytest.mark.parametrize("name", ["plain", "residual", "separable", "attention", "sequence"])
def test_every_channels_mean_is_the_float_networks(name: str) -> None:
    task = task_of(name, 4)
    found = ROUNDERS["qronos"](task)[Rounding]
    before, behind = mean_errors(task, task.rounding), mean_errors(task, found)
    assert max(behind.values()) < 0.005
    assert max(behind.values()) < 0.2 * max(before.values())


@pytest.mark.parametrize("chosen", [0, 1])
def test_the_last_layers_aim_at_the_outputs_only_if_the_verdict_says_so(
    chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of("plain", 2, held_out=images("plain", 5))
    monkeypatch.setattr(verdict, "least", lambda _: chosen)
    monkeypatch.setattr(verdict, "rejection", lambda *_: "")
    found = ROUNDERS["qronos_rescaled"](task)[Rounding]
    assert list(found.weights) == [site.name for site in task.sites]
    aiming = task.sites if chosen else task.sites[:3]
    assert list(found.biases) == [name for site in aiming for name in site.nodes]
    last = task.sites[-1].name
    # Without images that decide, GPTQ has the last layers.
    blind = ROUNDERS["qronos_rescaled"](replace(task, held_out=None))[Rounding]
    assert torch.equal(blind.weights[last], found.weights[last]) is (chosen == 0)


def test_moments_are_of_the_network_rounded_and_corrected_in_front_of_the_layer() -> None:
    task = task_of("plain", 2, 4)
    seen: list[OutputMoments] = []

    def aim(rows: Tensor, moments: OutputMoments) -> tuple[Tensor, Moments]:
        seen.append(moments)
        return aimed(rows, moments, 0.01)

    found = round_layerwise(task, gptq_rows, "test", aim=aim)
    replays = GraphReplay(task.simulated(found).module), GraphReplay(task.program.module)
    with torch.no_grad():
        ours, floats = (replay.forward(task.images.inputs)[1] for replay in replays)
    for site, moments in zip(task.sites, seen, strict=True):
        node, other = (replay.by_name[site.nodes[0]] for replay in replays)
        source = node.args[0]
        assert isinstance(source, Node)
        wanted = output_moments(node, [ours[source]], [floats[other]])
        scale = wanted.gram.diagonal(dim1=1, dim2=2).max()
        # The walk has real biases, the simulated network those of the int32 accumulator.
        assert torch.allclose(moments.gram, wanted.gram, atol=float(scale) * 1e-2)
        assert torch.allclose(moments.outputs, wanted.outputs, atol=1e-4)
        values = rows_of(found.weights[site.name])
        plain = task.rounding.grid_of(site.name, task.program[WeightGrids]).round_trip(
            tensor_at(task.program.module, site.weight).detach()
        )
        assert (moments.error(values) <= moments.error(rows_of(plain)) * (1 + 1e-6)).all()


def test_rows_that_miss_the_outputs_are_rounded_to_nearest() -> None:
    task = task_of("plain", 4)

    def astray(rows: Tensor, moments: OutputMoments) -> tuple[Tensor, Moments]:
        return -rows, Moments(moments.gram, moments.gram)

    found = round_layerwise(task, gptq_rows, "test", aim=astray)
    for site in task.sites:
        weight = tensor_at(task.program.module, site.weight).detach()
        grid = task.rounding.grid_of(site.name, task.program[WeightGrids])
        assert torch.equal(found.weights[site.name], grid.round_trip(weight))


def test_moments_of_values_whose_squares_leave_float32_are_finite() -> None:
    x = 1e25 * seeded(20, 3).float()
    node = op_node(torch.ops.aten.linear.default, x, torch.ones(2, 3))
    found = output_moments(node, [x], [x[:, :2]])
    assert all(torch.isfinite(getattr(found, name)).all() for name in ("gram", "cross", "power"))
    assert torch.allclose(found.power[0], centred(x[None, :, :2].double()).square().sum(dim=1)[0], rtol=1e-6)
