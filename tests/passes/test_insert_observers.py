from __future__ import annotations

import pytest
import torch

from fxquant.core.errors import CalibrationError, OptionError
from fxquant.core.facts import Ranges
from fxquant.core.ir import show
from fxquant.core.run import OBSERVERS
from fxquant.passes import CollectRanges, InsertObservers
from tests.models import MODELS
from tests.programs import check_pass, tied


def test_observers_stand_on_quantized_edges_only() -> None:
    done = check_pass(InsertObservers("minmax"), tied("residual"))
    assert done.log[-1].rewrites == 6
    assert show(done.module) == (
        "x = x()\n"
        "observe_x = MinMaxObserver(x)\n"
        "conv2d = conv2d.default(observe_x, conv1.weight, conv1.bias)\n"
        "relu = relu.default(conv2d)\n"
        "observe_relu = MinMaxObserver(relu)\n"
        "conv2d_1 = conv2d.default(observe_relu, conv2.weight, conv2.bias)\n"
        "observe_conv2d_1 = MinMaxObserver(conv2d_1)\n"
        "add_25 = add.Tensor(observe_relu, observe_conv2d_1)\n"
        "relu_1 = relu.default(add_25)\n"
        "observe_relu_1 = MinMaxObserver(relu_1)\n"
        "silu = silu.default(observe_relu_1)\n"
        "conv2d_2 = conv2d.default(observe_relu_1, conv3.weight, conv3.bias)\n"
        "observe_conv2d_2 = MinMaxObserver(conv2d_2)\n"
        "add_46 = add.Tensor(silu, observe_conv2d_2)\n"
        "mean = mean.dim(add_46)\n"
        "observe_mean = MinMaxObserver(mean)\n"
        "linear = linear.default(observe_mean, fc.weight, fc.bias)\n"
        "return linear"
    )


def test_several_inputs_and_an_answer_that_is_observed() -> None:
    done = InsertObservers("minmax")(tied("two_inputs"))
    lines = show(done.module).splitlines()
    assert lines[0].startswith("image = ")
    assert lines[1].startswith("mask = ")
    assert lines[-1] == "return mean, observe_conv2d"
    # Both inputs come before what is inserted behind the first of them.
    inputs = MODELS["two_inputs"].inputs(3)
    before, after = tied("two_inputs").module(*inputs), done.module(*inputs)
    assert torch.equal(before["logits"], after["logits"])
    assert torch.equal(before["features"], after["features"])


@pytest.mark.parametrize("name", ["residual", "concat", "attention", "two_inputs"])
def test_in_and_out_again_is_the_same_graph(name: str) -> None:
    prepared = InsertObservers()(tied(name))
    prepared.module(*MODELS[name].inputs(2))
    done = CollectRanges()(prepared)
    assert show(done.module) == show(tied(name).module)
    assert done.log[-1].rewrites == prepared.log[-1].rewrites
    again = CollectRanges()(done)
    assert again.log[-1].rewrites == 0


@pytest.mark.parametrize("observer", list(OBSERVERS))
def test_every_observer_leaves_ranges(observer: str) -> None:
    prepared = InsertObservers(observer)(tied("sequence"))
    prepared.module(*MODELS["sequence"].inputs(4))
    ranges = CollectRanges()(prepared)[Ranges]
    assert set(ranges.histograms) == {"x", "relu", "max_pool1d", "slice_2", "conv1d_1"}
    assert ranges.clip == (observer if observer in ("mse", "gaussian") else "full")


def test_collecting_before_any_image() -> None:
    with pytest.raises(CalibrationError, match=r"value 'x' was never observed; run calibration images"):
        CollectRanges()(InsertObservers()(tied("sequence")))


def test_an_unknown_observer() -> None:
    with pytest.raises(OptionError, match="unknown observer 'max'"):
        InsertObservers("max")(tied("sequence"))


def test_a_graph_without_quantized_edges() -> None:
    done = InsertObservers()(tied("weightless"))
    assert done.log[-1].rewrites == 0
    assert CollectRanges()(done)[Ranges].histograms == {}
