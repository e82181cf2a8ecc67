from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.capture import plain_answer
from fxquant.core.errors import CaptureError

LOGITS, FEATURES = torch.zeros(2, 3), torch.ones(2, 4)


@dataclass
class Output:
    loss: Tensor | None = None
    features: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class KnownOutput:
    """Stands for the outputs of Hugging Face models."""

    features: Tensor
    logits: Tensor


Pair = namedtuple("Pair", ["features", "logits"])


class Opaque:
    pass


@pytest.mark.parametrize(
    ("output", "kind", "names"),
    [
        (Output(None, FEATURES, LOGITS), dict, ["logits", "loss", "features"]),
        ({"features": FEATURES, "logits": LOGITS}, dict, ["logits", "features"]),
        (OrderedDict(aux=FEATURES, logits=LOGITS), OrderedDict, ["logits", "aux"]),
        ({"out": LOGITS, "aux": FEATURES}, dict, ["out", "aux"]),
        ({"scores": LOGITS, "logits": None}, dict, ["scores", "logits"]),
        ({"n": 3, "logits": LOGITS, "deep": Output(LOGITS)}, dict, ["logits", "n", "deep"]),
        (Pair(FEATURES, LOGITS), dict, ["logits", "features"]),
    ],
)
def test_the_answer_comes_first(output: object, kind: type[dict[str, Any]], names: list[str]) -> None:
    made = plain_answer(output)
    assert type(made) is kind
    assert list(made) == names
    assert not any(isinstance(value, Output) for value in made.values())


def test_what_torch_knows_stays_what_it_is() -> None:
    for output in (LOGITS, (FEATURES, LOGITS), [LOGITS, None]):
        made = plain_answer(output)
        assert type(made) is type(output)
    nested = plain_answer((Output(logits=LOGITS), FEATURES))
    assert list(nested[0]) == ["logits", "loss", "features"]
    known = KnownOutput(FEATURES, LOGITS)
    assert list(plain_answer(known)) == ["logits", "features"]
    torch.export.register_dataclass(KnownOutput)
    assert plain_answer(known) is known


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (Opaque(), "the model returns a Opaque, whose tensors a graph cannot tell; return tensors, or a tuple"),
        ({"logits": LOGITS, "cache": Opaque()}, "returns a Opaque"),
        ({"loss": None, "n": 3}, "returns dict without a tensor; return its logits"),
        (None, "returns NoneType without a tensor"),
    ],
)
def test_outputs_that_hold_no_answer(output: object, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        plain_answer(output)
