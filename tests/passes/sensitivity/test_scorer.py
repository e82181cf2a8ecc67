from __future__ import annotations

import numpy as np
import pytest
import torch

from fxquant.core.data import CalibrationSet
from fxquant.core.grids import FakeQuantNodes
from fxquant.core.score_store import ScoreStore
from fxquant.core.spec import Candidate, Choice
from fxquant.passes.sensitivity import scorer as scorer_module
from fxquant.passes.sensitivity.scorer import Part, Scorer
from tests.scoring import columns, full_forward, inputs, scorer, simulated, traced

IMAGES = CalibrationSet(inputs("plain", 6))


def test_the_base_is_the_float_network_bit_for_bit() -> None:
    reference, _ = scorer(simulated("plain"), IMAGES).base(Part(0, IMAGES))
    with torch.no_grad():
        assert torch.equal(reference, traced("plain").module(*IMAGES.inputs))


@pytest.mark.parametrize("name", ["plain", "shared", "two_inputs"])
def test_every_candidate_alone_is_a_whole_forward_pass(name: str) -> None:
    images = CalibrationSet(inputs(name, 6))
    each = scorer(simulated(name), images)
    _, base = each.base(Part(0, images))
    for column, candidate in enumerate(each.candidates):
        answer, _ = each.run(base, column)
        assert torch.equal(answer, full_forward(name, 6, candidate))


def test_activation_bits_of_a_candidate_count() -> None:
    each = scorer(simulated("plain", (8,), (4, 8)), IMAGES)
    reference, base = each.base(Part(0, IMAGES))
    column = {c: k for k, c in enumerate(each.candidates)}
    for site in ("conv1", "conv2", "fc"):
        coarse, fine = (
            float(each.losses(reference, each.run(base, column[Candidate(site, Choice(8, bits))])[0], IMAGES).mean())
            for bits in (4, 8)
        )
        assert coarse > 5 * fine > 0


def test_substitutions_leave_the_program_alone() -> None:
    program = simulated("plain")
    before = {key: value.clone() for key, value in program.module.state_dict().items()}
    each = scorer(program, IMAGES)
    _, base = each.base(Part(0, IMAGES))
    for column in range(len(each.candidates)):
        each.run(base, column)
    assert all(torch.equal(value, before[key]) for key, value in program.module.state_dict().items())


def test_the_batches_cover_every_image_once() -> None:
    each = scorer(simulated("plain"), IMAGES)
    assert [len(part.images) for part in each.parts] == [4, 2]
    assert torch.equal(torch.cat([part.images.inputs[0] for part in each.parts]), IMAGES.inputs[0])
    assert [part.index for part in each.parts] == [0, 1]


def test_large_intermediate_values_make_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def batch(limit: int) -> int:
        monkeypatch.setattr(scorer_module, "ENVIRONMENT_LIMIT", limit)
        return Scorer(simulated("plain"), IMAGES, "kl", ScoreStore(None, {})).batch

    assert batch(10**9) == 6
    assert 1 <= batch(20_000) < 6
    assert batch(1) == 1


def test_work_is_counted_in_whole_passes() -> None:
    each = scorer(simulated("plain"), IMAGES)
    assert each.take_spent(1) == 0
    _, base = each.base(Part(0, IMAGES))
    assert each.take_spent(6) == pytest.approx(6)
    each.base(Part(0, IMAGES))
    assert each.take_spent(6) == 0
    spent = {}
    for column, candidate in enumerate(each.candidates):
        each.run(base, column)
        spent[candidate.site] = each.take_spent(1)
    assert 0 < spent["fc"] < spent["conv2"] < spent["conv1"] <= 1


def test_columns_by_depth_follow_the_graph() -> None:
    program = simulated("plain")
    each = scorer(program, IMAGES)
    order = list(dict.fromkeys(each.candidates[k].site for k in each.by_depth))
    names = [node.name for node in program.module.graph.nodes]
    first = {site: min(names.index(n) for n in nodes) for site, nodes in program[FakeQuantNodes].inputs.items()}
    assert sorted(each.by_depth) == list(range(len(columns(program))))
    assert order == sorted(order, key=lambda site: (first[site], site))


def test_losses_are_float64_per_image() -> None:
    each = scorer(simulated("plain"), IMAGES)
    reference, _ = each.base(Part(0, IMAGES))
    found = each.losses(reference, reference, IMAGES)
    assert found.dtype == torch.float64
    assert np.array_equal(found.numpy(), np.zeros(6))
