from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from fxquant.capture import capture
from fxquant.core.errors import CaptureError
from fxquant.core.ir import Program, show
from fxquant.passes import Canonicalize, FoldBatchnorm
from tests.models import MODELS, Composed
from tests.programs import captured, check_pass


def norms(program: Program) -> int:
    return show(program.module).count("_native_batch_norm_legit_no_training.default(")


@pytest.mark.parametrize(
    ("name", "folds", "left"),
    [
        ("residual", 2, 0),
        ("separable", 1, 0),  # depthwise, no bias before
        ("sequence", 1, 0),  # one dimension
        ("shared", 0, 2),  # one weight, two norms
        ("concat", 0, 1),  # behind a concatenation
        ("token_norm", 0, 1),  # over tokens, not over outputs
        ("bias_elsewhere", 1, 0),
        ("tokens", 0, 0),
    ],
)
def test_what_folds_and_what_does_not(name: str, folds: int, left: int) -> None:
    before = Canonicalize()(captured(name))
    done = check_pass(FoldBatchnorm(), before)
    assert done.log[-1].rewrites == folds
    assert norms(done) == left
    again = check_pass(FoldBatchnorm(), done)
    assert again.log[-1].rewrites == 0
    assert show(again.module) == show(done.module)
    inputs = MODELS[name].inputs(4)
    leaves = torch.utils._pytree.tree_leaves
    for one, other in zip(leaves(before.module(*inputs)), leaves(done.module(*inputs)), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_folded_graph() -> None:
    assert show(FoldBatchnorm()(captured("sequence")).module).splitlines()[:3] == [
        "x = x()",
        "conv1d = conv1d.padding(x, conv1.weight, conv1.bias)",
        "relu = relu.default(conv1d)",
    ]


def test_the_algebra() -> None:
    module = captured("residual").module
    state = module.state_dict()
    done = FoldBatchnorm()(captured("residual")).module.state_dict()
    factor = state["bn1.weight"] / (state["bn1.running_var"] + 1e-5).sqrt()
    assert torch.allclose(done["conv1.weight"], state["conv1.weight"] * factor[:, None, None, None], rtol=1e-5)
    assert torch.allclose(done["conv1.bias"], state["bn1.bias"] - state["bn1.running_mean"] * factor, atol=1e-6)
    assert not any(key.startswith("bn") for key in done)


def test_a_bias_that_serves_another_op_is_left_alone() -> None:
    before = captured("bias_elsewhere")
    done = FoldBatchnorm()(before)
    assert torch.equal(done.module.get_parameter("bias"), before.module.get_parameter("bias"))
    assert done.module.get_parameter("weight_folded_bias").shape == (4,)


def test_a_value_with_a_second_reader_is_not_folded_away() -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = net.linear(x)
        answer: torch.Tensor = net.norm(y) + y
        return answer

    model = Composed(forward, linear=nn.Linear(3, 4), norm=nn.BatchNorm1d(4)).eval()
    program = capture(model, (torch.randn(2, 3),))
    assert FoldBatchnorm()(program).log[-1].rewrites == 0


@cache
def captured_norm() -> Program:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    return Canonicalize()(capture(model, (torch.randn(2, 3, 4, 4),)))


def normalised() -> Program:
    """Return a convolution and its batch norm, a copy whose numbers a test may spoil."""
    return deepcopy(captured_norm())


@pytest.mark.parametrize(("path", "value"), [("running_mean", torch.inf), ("running_var", -1.0), ("weight", 3e38)])
def test_broken_statistics_name_the_layer_in_front(path: str, value: float) -> None:
    program = normalised()
    program.module.state_dict()["0.weight"].fill_(2.0)
    program.module.state_dict()[f"1.{path}"].fill_(value)
    with pytest.raises(CaptureError, match=r"behind '0\.weight' makes weights that are not finite"):
        FoldBatchnorm()(program)


def test_a_variance_without_end_leaves_the_shift() -> None:
    program, x = normalised(), torch.randn(2, 3, 4, 4)
    program.module.state_dict()["1.running_var"].fill_(torch.inf)
    assert torch.equal(FoldBatchnorm()(program).module(x), program.module(x))


def test_epsilon_counts_where_the_variance_is_small() -> None:
    norm = nn.BatchNorm2d(4, eps=0.5)
    assert norm.running_var is not None
    norm.running_var.fill_(0.01)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
    done = FoldBatchnorm()(Canonicalize()(capture(model, (x,))))
    assert norms(done) == 0
    assert torch.allclose(done.module(x), model(x), atol=1e-5)
