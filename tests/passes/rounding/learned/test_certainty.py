"""The prediction difference is left out where the network knows the images by heart, and the result says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxquant.core.facts import Rounding
from fxquant.core.run import LOSSES
from fxquant.core.storage import ScoreStore
from fxquant.passes.rounding import ROUNDERS
from fxquant.passes.rounding.learned import PROFILES, certainty, where_it_pays
from tests.passes.rounding.tasks import task_of

PDQUANT = PROFILES["pdquant"].stages["pdquant"]
SHORT: dict[str, object] = {"iterations": 3, "batch": 4, "correction": 0}


def logits(*probabilities: float) -> Tensor:
    """Return logits of two classes, of which one has these probabilities."""
    p = torch.tensor(probabilities)
    return torch.stack([p, 1 - p], dim=1).log()


def test_certainty_is_the_mean_probability_of_the_likeliest_class() -> None:
    assert LOSSES["kl"].certainty(logits(0.9, 0.2, 0.5)) == pytest.approx((0.9 + 0.8 + 0.5) / 3, rel=1e-5)
    positions = logits(0.9, 0.2, 0.5).T.reshape(1, 2, 3)
    assert LOSSES["kl"].certainty(positions) == pytest.approx((0.9 + 0.8 + 0.5) / 3, rel=1e-5)
    assert LOSSES["mse"].certainty(logits(0.9)) is None


@pytest.mark.parametrize(("sure", "kept"), [(0.95, False), (0.8, True)])
def test_it_is_left_out_where_the_network_is_certain(sure: float, kept: bool) -> None:
    options, note = where_it_pays(PDQUANT, (), LOSSES["kl"], logits(sure))
    assert f"{sure:.2f}" in note
    assert (options == PDQUANT) is kept
    assert (options.prediction, options.correction, options.answer_by_prediction) == (
        (PDQUANT.prediction, PDQUANT.correction, True) if kept else (0.0, 0, False)
    )


def test_what_is_asked_for_is_done() -> None:
    certain = logits(0.99)
    for options, given, loss in (
        (PDQUANT, ("prediction",), "kl"),
        (replace(PDQUANT, prediction_where="always"), (), "kl"),
        (PDQUANT, (), "mse"),
        (replace(PDQUANT, prediction=0.0), (), "kl"),
    ):
        assert where_it_pays(options, given, LOSSES[loss], certain) == (options, "")


def test_without_it_the_profile_is_qdrop(monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(task_of("plain", 2), loss="kl", overrides=SHORT)
    monkeypatch.setattr(certainty, "CERTAIN", 0.0)
    found = ROUNDERS["pdquant"](given)[Rounding]
    assert any("prediction difference is left out" in note for note in found.notes)
    asked = replace(given, overrides={**SHORT, "prediction": 0.1}, store=ScoreStore(None, {}))
    with_it = ROUNDERS["pdquant"](asked)[Rounding]
    assert not with_it.notes
    steps, others = ([grid.scale for grid in each.activations.values()] for each in (found, with_it))
    assert any(not torch.equal(one, other) for one, other in zip(steps, others, strict=True))
