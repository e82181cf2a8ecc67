from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.core.facts import BitAllocation
from fxquant.core.ir import Choice, Sites
from fxquant.core.run import LOSSES, CalibrationSet
from fxquant.core.storage import ScoreStore
from fxquant.passes.sensitivity import ESTIMATORS, Scorer
from tests.scoring import inputs, scorer, simulated

fisher = ESTIMATORS["fisher"]
gram = ESTIMATORS["gram"]
pairs = ESTIMATORS["pairs"]


# The images it was calibrated on, many times over: no clipping, whose rare large shifts would need many more images.
MANY = CalibrationSet((inputs("split", 8)[0].repeat(250, 1),))


def ratio() -> float:
    """Mean of modelled over measured single losses, weighted by the loss, at 6 bits where the loss is quadratic."""
    each = Scorer(simulated("split", (6,)), MANY, "kl", ScoreStore(None, {}))
    return float(np.diag(fisher(each).values).sum() / np.diag(gram(each).values).sum())


def test_sampled_cotangents_give_the_measured_loss() -> None:
    assert ratio() == pytest.approx(1, abs=0.06)


def test_labels_sampled_from_the_model_give_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def labels(answer: Tensor, reference: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        del reference
        return LOSSES["kl"].sample_labels(answer, generators)

    monkeypatch.setattr(LOSSES["kl"], "sample", labels)
    assert ratio() == pytest.approx(1, abs=0.08)


def test_the_most_likely_class_gives_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    def argmax(answer: Tensor, reference: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        del reference, generators
        q = torch.softmax(answer, 1)
        return torch.nn.functional.one_hot(q.argmax(1), q.shape[1]) - q

    monkeypatch.setattr(LOSSES["kl"], "sample", argmax)
    assert ratio() < 0.8


def test_squares_are_taken_image_by_image() -> None:
    each = Scorer(simulated("split", (6,)), MANY, "kl", ScoreStore(None, {}))
    found = np.diag(fisher(each).values)
    (cell,) = each.measure("again", {"fisher-0": dict}).values()
    of_the_mean = 0.5 * cell["responses"].mean(axis=2)[0] ** 2
    assert (of_the_mean < 0.3 * found).all()


def test_pairs_approach_the_measured_ones_as_perturbations_shrink() -> None:
    each = Scorer(simulated("split", (6,)), MANY, "mse", ScoreStore(None, {}))
    modelled, exact = fisher(each).values, pairs(each).values
    np.testing.assert_allclose(modelled, exact, rtol=0.15, atol=0.1 * np.abs(exact).max())


def test_around_a_plan_the_slope_counts() -> None:
    """Giving bits back must lower the modelled loss, which only the first-order term can say."""
    program, images = simulated("plain"), CalibrationSet(inputs("plain", 6))
    plan = BitAllocation({site.name: Choice(2, 8) for site in program[Sites].sites})
    found = fisher(Scorer(program, images, "kl", ScoreStore(None, {}), context=plan))
    wider = [k for k, c in enumerate(found.candidates) if c.choice.weight_bits == 8]
    assert found.constant > 0
    assert np.diag(found.values)[wider].min() < 0


def test_a_few_passes_per_image() -> None:
    found = fisher(scorer(simulated("plain"), CalibrationSet(inputs("plain", 6))))
    # Float run, recorded run, backward run, and each op once for each of three widths.
    assert found.evaluations <= 6 * (1 + 1 + 1 + 3)


def test_another_seed_samples_other_labels() -> None:
    program, images = simulated("plain"), CalibrationSet(inputs("plain", 6))
    one, other = (fisher(Scorer(program, images, "kl", ScoreStore(None, {}), seed=seed)) for seed in (0, 1))
    assert not np.array_equal(one.values, other.values)
