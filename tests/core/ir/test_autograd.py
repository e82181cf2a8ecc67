from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import fxquant
from fxquant.core.facts import Budget
from fxquant.core.ir import differentiable, gradients
from tests.small import SmallNet


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_gradients_are_recorded_in_every_mode(mode: Any) -> None:
    with mode():
        images = torch.ones(3)
        with gradients():
            weight = torch.ones(3, requires_grad=True)
            torch.autograd.backward((weight * differentiable(images)).sum())
        assert torch.is_grad_enabled() == (mode is nullcontext)
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(3))


def test_only_what_inference_mode_made_is_copied() -> None:
    plain = torch.ones(3)
    assert differentiable(plain) is plain


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_quantizing_gives_the_same_plan_in_every_mode(mode: Any) -> None:
    def plan() -> tuple[Any, torch.Tensor]:
        torch.manual_seed(0)
        model, images = SmallNet().eval(), torch.rand(12, 1, 8, 8)
        few = {"rounding_options": {"iterations": 3, "batch": 4}}
        result = fxquant.quantize(model, images, Budget(average_bits=5), rounding="adaround", options=few)
        return result.allocation.choices, result.lowered(images)

    choices, answer = plan()
    with mode():
        same, again = plan()
    assert same == choices
    torch.testing.assert_close(again, answer)
