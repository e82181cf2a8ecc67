from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import flow
from fxquant.capture import capture
from fxquant.core.facts import Settings
from fxquant.core.ir import Program, Sites, show
from fxquant.passes import Canonicalize, FoldConstants
from tests.models import MODELS, Composed
from tests.programs import captured, check_pass


class Standardised(nn.Module):
    """A convolution whose filters have mean 0 and variance 1 in front of a learned gain."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, channels, 3, 3))
        self.bias = nn.Parameter(torch.randn(count))
        self.gain = nn.Parameter(torch.rand(count, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.weight.shape[0], -1)
        rows = F.batch_norm(rows, None, None, self.gain.flatten(), training=True, momentum=0.0)
        return F.conv2d(x, rows.reshape_as(self.weight), self.bias, padding=1)


class PositionNet(nn.Module):
    """A table looked up by an index that is a buffer, added to scores; a view of a parameter, and a wide mask."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 4)
        self.table = nn.Parameter(torch.randn(9))
        self.register_buffer("index", torch.arange(20).reshape(5, 4) % 9)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(5).unsqueeze(1) * 0.1
        answer: Tensor = self.stem(x) + self.table[self.index] + self.shift.reshape(1, 4) + steps
        return answer


def folded(model: nn.Module, *inputs: Tensor) -> tuple[Program, Program]:
    before = Canonicalize()(capture(model, inputs))
    return before, check_pass(FoldConstants(), before)


def test_standardised_weights_become_weights_at_their_own_path() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Standardised(3, 4), nn.ReLU(), Standardised(4, 2))
    x = torch.randn(3, 3, 6, 6)
    before, done = folded(model, x)
    assert done.log[-1].rewrites == 2
    assert show(done.module).splitlines()[1:4] == [
        "conv2d = conv2d.default(input_1, 0.weight, 0.bias)",
        "relu = relu.default(conv2d)",
        "conv2d_1 = conv2d.default(relu, 2.weight, 2.bias)",
    ]
    assert "0.gain" not in done.module.state_dict()
    weight = done.module.get_parameter("0.weight")
    assert weight.requires_grad
    rows = weight.detach().flatten(1)
    assert torch.allclose(rows.mean(dim=1), torch.zeros(4), atol=1e-6)
    assert torch.allclose(done.module(x), before.module(x), atol=1e-5)
    sites = flow.find_sites(capture(model, (x,)), Settings(bits=(8,)))[Sites]
    assert [site.name for site in sites.sites] == ["0", "2"]
    assert not sites.refusals


def test_tables_are_looked_up_once_and_views_stay_parameters() -> None:
    torch.manual_seed(0)
    model, x = PositionNet(), torch.randn(3, 5, 6)
    before, done = folded(model, x)
    assert done.log[-1].rewrites == 2
    text = show(done.module)
    assert "index.Tensor" not in text
    assert "arange" not in text
    assert "reshape.default(shift)" in text
    assert torch.allclose(done.module(x), before.module(x), atol=1e-6)
    shapes = {name: tuple(value.shape) for name, value in done.module.named_parameters()}
    assert shapes == {"stem.weight": (4, 6), "stem.bias": (4,), "table": (5, 4), "shift": (4,)}
    assert [tuple(value.shape) for value in done.module.buffers()] == [(5, 1)]
    again = check_pass(FoldConstants(), done)
    assert again.log[-1].rewrites == 0
    assert show(again.module) == text


def test_a_parameter_that_others_read_keeps_its_value() -> None:
    torch.manual_seed(0)
    weight, x = nn.Parameter(torch.randn(4, 4)), torch.randn(3, 4)
    model = Composed(lambda net, x: F.linear(F.linear(x, net.weight), net.weight * 0.5), weight=weight)
    before, done = folded(model, x)
    assert torch.equal(done.module.get_parameter("weight"), before.module.get_parameter("weight"))
    names = list(done.module.state_dict())
    assert len(names) == 2
    assert all(name == "weight" or name.startswith("weight_folded_mul") for name in names)
    assert torch.allclose(done.module(x), before.module(x), atol=1e-6)


def test_a_value_much_larger_than_its_sources_is_not_kept() -> None:
    row = nn.Parameter(torch.randn(4))
    wide = Composed(lambda net, x: (net.row.exp().expand(100_000, 4) * x.mean()).sum(dim=0), row=row)
    before, done = folded(wide, torch.randn(3, 4))
    # What comes before the expansion is small and is computed.
    assert done.log[-1].rewrites == 1
    assert "exp.default" not in show(done.module)
    assert sum(t.nbytes for t in done.module.state_dict().values()) == 16
    x = torch.randn(3, 4)
    assert torch.allclose(done.module(x), before.module(x), rtol=1e-4)


@pytest.mark.parametrize("name", ["attention", "tokens", "shared"])
def test_answers_stay(name: str) -> None:
    before = Canonicalize()(captured(name))
    done = check_pass(FoldConstants(), before)
    inputs = MODELS[name].inputs(3)
    leaves = torch.utils._pytree.tree_leaves
    for one, other in zip(leaves(before.module(*inputs)), leaves(done.module(*inputs)), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
