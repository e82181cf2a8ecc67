from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fxquant.core.facts import BitAllocation, SensitivityMatrix
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import LOSSES, CalibrationSet, model_outputs, storages
from fxquant.core.storage import ScoreStore
from fxquant.passes import simulate, widest_plan
from fxquant.passes.sensitivity import ESTIMATORS, Batch, Scorer
from fxquant.passes.sensitivity import scorer as scorer_module
from tests.scoring import calibrated, full_forward, inputs, scorer, simulated, traced

diagonal = ESTIMATORS["diagonal"]
fisher = ESTIMATORS["fisher"]
pairs = ESTIMATORS["pairs"]
IMAGES = CalibrationSet(inputs("plain", 6))


def test_the_base_is_the_float_network() -> None:
    base = scorer(simulated("plain"), IMAGES).base(Batch(0, IMAGES))
    assert torch.equal(base.reference, base.answer)
    with torch.no_grad():
        torch.testing.assert_close(base.reference, traced("plain").module(*IMAGES.inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "shared", "two_inputs"])
def test_every_candidate_alone_is_a_whole_forward_pass(name: str) -> None:
    images = CalibrationSet(inputs(name, 6))
    each = scorer(simulated(name), images)
    base = each.base(Batch(0, images)).environment
    for column, candidate in enumerate(each.candidates):
        answer, _ = each.run(base, column)
        assert torch.equal(answer, full_forward(name, 6, candidate))


def test_substitutions_leave_the_program_alone() -> None:
    program = simulated("plain")
    before = {key: value.clone() for key, value in program.module.state_dict().items()}
    each = scorer(program, IMAGES)
    base = each.base(Batch(0, IMAGES)).environment
    for column in range(len(each.candidates)):
        each.run(base, column)
    assert all(torch.equal(value, before[key]) for key, value in program.module.state_dict().items())


def test_the_batches_cover_every_image_once() -> None:
    each = scorer(simulated("plain"), IMAGES)
    assert [len(batch.images) for batch in each.batches] == [4, 2]
    assert torch.equal(torch.cat([batch.images.inputs[0] for batch in each.batches]), IMAGES.inputs[0])
    assert [batch.index for batch in each.batches] == [0, 1]


def test_large_intermediate_values_make_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def batch(limit: int) -> int:
        monkeypatch.setattr(scorer_module, "ENVIRONMENT_LIMIT", limit)
        return Scorer(simulated("plain"), IMAGES, "kl", ScoreStore(None, {})).batch

    assert batch(10**9) == 6
    assert 1 <= batch(12_000) < 6
    assert batch(1) == 1


def test_work_is_counted_in_whole_passes() -> None:
    each = scorer(simulated("plain"), IMAGES)
    assert each.take_spent(1) == 0
    base = each.base(Batch(0, IMAGES)).environment
    assert each.take_spent(6) == pytest.approx(6)
    each.base(Batch(0, IMAGES))
    assert each.take_spent(6) == 0
    spent = {}
    for column, candidate in enumerate(each.candidates):
        each.run(base, column)
        spent[candidate.site] = each.take_spent(1)
    assert 0 < spent["fc"] < spent["conv2"] < spent["conv1"] <= 1


@pytest.mark.parametrize("name", ["plain", "residual", "shared"])
def test_columns_by_depth_follow_the_graph(name: str) -> None:
    program = simulated(name)
    each = scorer(program, CalibrationSet(inputs(name, 6)))
    order = list(dict.fromkeys(each.candidates[k].site for k in each.by_depth))
    names = [node.name for node in program.module.graph.nodes]
    assert sorted(each.by_depth) == list(range(len(program[Sites].candidates)))
    # The ops' order, not that of the weights, which stand anywhere before them.
    assert order == sorted(order, key=lambda site: names.index(program[Sites].by_name(site).nodes[0]))


def test_losses_are_float64_per_image() -> None:
    each = scorer(simulated("plain"), IMAGES)
    base = each.base(Batch(0, IMAGES))
    found = each.losses(base, base.reference, IMAGES)
    assert found.dtype == torch.float64
    assert np.array_equal(found.numpy(), np.zeros(6))


def choices(name: str, *labels: str) -> dict[str, Choice]:
    sites = simulated(name)[Sites].sites
    return {site.name: Choice.parse(label) for site, label in zip(sites, labels, strict=True)}


def measured(program: Program, plan: dict[str, Choice], images: CalibrationSet) -> float:
    """KL of a whole plan, by its simulated graph and whole forward passes."""
    module = simulate(program, BitAllocation(plan), round_biases=False).module
    answer, reference = (model_outputs(each, images.inputs) for each in (module, program.module))
    return float(LOSSES["kl"](reference, answer, None).mean())


@pytest.mark.parametrize("widths", [(8,), (4, 8)])
def test_around_a_plan_two_changed_owners_are_modelled_exactly(widths: tuple[int, ...]) -> None:
    calibrated_program = calibrated("plain", (2, 4, 8), widths)
    context = choices("plain", "W4A8", "W4A8", "W8A8", "W4A8")
    each = Scorer(
        simulated("plain", (2, 4, 8), widths), IMAGES, "kl", ScoreStore(None, {}), context=BitAllocation(context)
    )
    found = pairs(each)
    assert found.constant == pytest.approx(measured(calibrated_program, context, IMAGES), rel=1e-4)
    assert found.predict(context) == pytest.approx(found.constant, rel=1e-6)
    other = [("W2A8", "W4A8", "W2A8", "W4A8"), ("W4A8", "W8A8", "W8A8", "W2A8"), ("W4A8", "W4A8", "W4A8", "W4A8")]
    if len(widths) > 1:
        # The input's width and one weight; the width of the value that two layers read.
        other += [("W2A4", "W4A8", "W8A8", "W4A8"), ("W4A8", "W4A4", "W8A4", "W4A8")]
    for labels in other:
        plan = choices("plain", *labels)
        assert found.predict(plan) == pytest.approx(measured(calibrated_program, plan, IMAGES), rel=1e-3, abs=1e-9)


def test_a_context_leaves_its_own_choices_at_zero() -> None:
    context = choices("plain", "W4A8", "W2A8", "W8A8", "W4A8")
    each = Scorer(simulated("plain"), IMAGES, "kl", ScoreStore(None, {}), context=BitAllocation(context))
    found = pairs(each)
    own = [k for k, c in enumerate(found.candidates) if context[c.site] == c.choice]
    assert len(own) == 4
    assert np.abs(found.values[own]).max() == 0
    assert found.values.any()


@pytest.mark.parametrize(("name", "around"), [("residual", False), ("residual", True), ("attention", True)])
def test_values_that_do_not_fit_are_computed_again_to_the_same_bits(
    name: str, around: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, images = simulated(name), CalibrationSet(inputs(name, 2))
    context = widest_plan(program) if around else None

    def made(limit: int) -> Scorer:
        monkeypatch.setattr(scorer_module, "ENVIRONMENT_LIMIT", limit)
        each = Scorer(program, images, "kl", ScoreStore(None, {}), context=context)
        each.batch = 1
        return each

    whole = made(10**9)
    assert not whole.memory.recomputes
    expected = pairs(whole)
    for limit in (1, whole.memory.activations // 3):
        each = made(limit)
        assert each.memory.recomputes
        assert each.memory.activations <= limit
        assert each.memory.total < whole.memory.total
        found = pairs(each)
        assert np.array_equal(found.values, expected.values)
        assert np.array_equal(found.stderr, expected.stderr)
        assert found.evaluations > expected.evaluations


def test_memory_is_known_before_the_work() -> None:
    each = Scorer(simulated("plain"), IMAGES, "kl", ScoreStore(None, {}))
    stated = each.memory
    assert stated.batch == 6
    assert stated.joint == 8 * len(each.columns) ** 2 * 6
    base = each.base(Batch(0, IMAGES)).environment
    held = {node: value for node, value in base.items() if node.op == "get_attr" or node.op == "placeholder"}
    assert stated.activations == sum(storages(base).values()) - sum(storages(held).values())
    assert 0 < stated.working <= stated.activations
    assert each.memory.total == 2 * stated.activations + stated.working + stated.joint


def test_cells_of_another_context_seed_or_batch_are_not_confused(tmp_path: Path) -> None:
    plans = [choices("plain", *labels) for labels in (("W4A8",) * 4, ("W2A8",) * 4)]

    def values(plan: dict[str, Choice] | None, seed: int, batch: int, folder: Path | None) -> SensitivityMatrix:
        around = None if plan is None else BitAllocation(plan)
        each = Scorer(simulated("plain"), IMAGES, "kl", ScoreStore(folder, {}), context=around, seed=seed)
        each.batch = batch
        return fisher(each)

    for plan in (None, *plans):
        for seed, batch in ((0, 6), (1, 6), (0, 4)):
            kept, fresh = (values(plan, seed, batch, folder) for folder in (tmp_path, None))
            assert np.array_equal(kept.values, fresh.values)
            assert kept.constant == fresh.constant
    assert len(list(tmp_path.glob("*fisher-0.npz"))) == 9
