from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.recipes import RECIPES
from fxquant.result import Result

WORDS, STEPS = 11, 5


class Words(nn.Module):
    """The next word from the last one: no memory, so that a text read twice is the same task."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 8)
        self.hidden = nn.Linear(8, 12)
        self.next = nn.Linear(12, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        logits: Tensor = self.next(torch.relu(self.hidden(self.table(words))))
        return logits


def text(times: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, WORDS, (16, STEPS), generator=generator).repeat(1, times)


def quantized(recipe: str, words: Tensor) -> Result:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Words().eval()
    options = {"curve": 0}
    return fxquant.quantize(
        model, words, "average_bits=4", recipe=recipe, target="reference", progress=False, options=options
    )


@pytest.mark.parametrize("name", ["kl-lm", "hessian-lm"])
def test_scores_are_per_token(name: str) -> None:
    once, twice = (quantized(name, text(times)) for times in (1, 2))
    assert once.sensitivity.unit == "KL nats"
    assert once.sensitivity.estimator == RECIPES[name].settings.estimators[0]
    scores = [torch.as_tensor(each.sensitivity.values).diagonal() for each in (once, twice)]
    assert (scores[0] > 0).sum() > 4
    if name == "kl-lm":
        # The Hessian is estimated with other signs for another shape.
        # So are the projections by which channels are equalized; what grows with the text would double.
        assert float(scores[1].sum() / scores[0].sum()) == pytest.approx(1, rel=0.4)
    assert once.allocation.used["average_bits"] <= 4
    assert {"hidden", "next"} <= once.allocation.choices.keys()


def test_another_loss_is_refused() -> None:
    with pytest.raises(fxquant.FxquantError, match="loss='mse' contradicts recipe 'kl-lm'"):
        fxquant.quantize(Words().eval(), text(), "average_bits=4", recipe="kl-lm", options={"loss": "mse"})
