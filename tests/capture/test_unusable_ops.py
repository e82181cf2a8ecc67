from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.capture import capture
from fxquant.core.errors import CaptureError

IMAGES = torch.randn(4, 3, 8, 8)


class Net(nn.Module):
    """A convolution, a classifier, an LSTM with dropout between its layers, and what `head` makes of them."""

    def __init__(self, head: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.scores = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.steps = nn.LSTM(8, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.head = head

    def forward(self, x: Tensor) -> Any:
        return self.head(self, torch.relu(self.stem(x)))


def pooled(y: Tensor) -> Tensor:
    return y.mean((2, 3))


def likely(n: Net, y: Tensor) -> Tensor:
    p: Tensor = n.scores(pooled(y)).softmax(1)
    return p


RANDOM: dict[str, Callable[[Net, Tensor], Any]] = {
    "dropout": lambda n, y: n.scores(F.dropout(pooled(y))),
    "feature_dropout": lambda _, y: F.dropout2d(y),
    "alpha_dropout": lambda n, y: n.scores(F.alpha_dropout(pooled(y), training=True)),
    "scaled_dot_product_attention": lambda _, y: F.scaled_dot_product_attention(y, y, y, dropout_p=0.1),
    "randn_like": lambda _, y: y + torch.randn_like(y),
    "bernoulli": lambda _, y: y * torch.bernoulli(y.sigmoid()),
    "multinomial": lambda n, y: torch.multinomial(likely(n, y), 1),
    "rrelu": lambda _, y: F.rrelu(y, training=True),
}
CERTAIN: dict[str, Callable[[Net, Tensor], Any]] = {
    "of no value": lambda n, y: n.scores(F.dropout(pooled(y), p=0.0)),
    "switched off": lambda n, y: n.scores(F.dropout(pooled(y), training=n.training)),
    "between the layers of an LSTM": lambda n, y: n.steps(y.mean(2).transpose(1, 2))[0],
    "never read": lambda n, y: (F.dropout(y), n.scores(pooled(y)))[1],
}
OF_SOME_LENGTH: dict[str, Callable[[Net, Tensor], Any]] = {
    "index": lambda n, y: likely(n, y)[likely(n, y).amax(1) > 0.2],
    "nonzero": lambda n, y: (likely(n, y) > 0.2).nonzero(),
    "masked_select": lambda n, y: torch.masked_select(likely(n, y), likely(n, y) > 0.2),
    "unique": lambda n, y: torch.unique(likely(n, y).argmax(1)),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_ops_are_named_with_their_line(name: str) -> None:
    with pytest.raises(CaptureError, match=rf"{name}.* random .*test_unusable_ops\.py:\d+: .*training=self.training"):
        capture(Net(RANDOM[name]), (IMAGES,))


@pytest.mark.parametrize("name", CERTAIN)
def test_dropout_that_is_off_is_none(name: str) -> None:
    module = capture(Net(CERTAIN[name]), (IMAGES,)).module
    assert torch.equal(module(IMAGES), module(IMAGES))


@pytest.mark.parametrize("name", OF_SOME_LENGTH)
def test_an_answer_of_some_length_is_refused_with_a_way_out(name: str) -> None:
    message = (
        rf"length of the answer depends on the data: aten\._?{name}.* at: test_unusable_ops\.py:\d+.*fxquant\.part\("
    )
    with pytest.raises(CaptureError, match=message):
        capture(Net(OF_SOME_LENGTH[name]), (IMAGES,))


def test_what_is_picked_inside_and_summed_up_has_a_shape() -> None:
    program = capture(Net(lambda n, y: likely(n, y)[likely(n, y).amax(1) > 0.2].sum() + likely(n, y)), (IMAGES,))
    assert program.module(IMAGES).shape == (4, 5)


class Tokens(nn.Module):
    """Patches and a class token through transformer layers; the length of a batch makes torch read the bytecode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.patches, self.layers = nn.Conv2d(3, 8, 4, 4), nn.TransformerEncoder(layer, 2)
        self.first = nn.Parameter(torch.rand(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(tokens), -1, -1), tokens], 1)
        answer: Tensor = self.layers(tokens)[:, 0]
        return answer


def _ops(module: nn.Module) -> set[str]:
    return {str(node.target) for node in module.graph.nodes}  # type: ignore[union-attr]


def test_transformers_are_captured_layer_by_layer() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    made = capture(Tokens().eval(), (IMAGES,)).module
    assert "aten._transformer_encoder_layer_fwd.default" not in _ops(made)
    assert sum(node.target is torch.ops.aten.linear.default for node in made.graph.nodes) == 2 * 4
    assert torch.backends.mha.get_fastpath_enabled() is before


def test_a_program_with_whole_layers_is_refused_with_a_way_out() -> None:
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        exported = torch.export.export(Tokens().eval(), (IMAGES,), dynamic_shapes=({0: batch},), strict=True)
    with pytest.raises(
        CaptureError, match=r"_transformer_encoder_layer_fwd.* whole layer .*set_fastpath_enabled\(False\)"
    ):
        capture(exported, ())
