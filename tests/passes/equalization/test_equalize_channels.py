"""The model of rounding noise, its minimum, and the pass."""

from __future__ import annotations

import pytest
import torch

from fxquant import flow
from fxquant.capture import capture
from fxquant.core.errors import FileFormatError
from fxquant.core.facts import ChannelScales, NormStatistics, Settings
from fxquant.core.ir import Program
from fxquant.core.run import CalibrationSet
from fxquant.passes import EqualizeChannels, scaled, without_observers
from fxquant.passes.equalization import (
    RoundingNoise,
    ValueNoise,
    WeightNoise,
    channel_factors,
    fewest_noise,
    measured_noise,
)
from tests.passes.equalization.networks import images, network, scale_channel


def _prepared(name: str) -> Program:
    return flow.prepare(capture(network(name), (images(2),)), Settings(bits=(8,)))


def _value(high: list[float], sensitivity: list[float], group: str = "x", levels: float = 255.0) -> ValueNoise:
    classes = torch.arange(1, len(high) + 1)
    return ValueNoise(group, classes, torch.zeros(len(high)), torch.tensor(high), torch.tensor(sensitivity), levels)


def test_the_noise_of_a_value_is_its_step_over_the_factor_of_each_class() -> None:
    noise = RoundingNoise(3, (_value([1.0, 4.0], [2.0, 3.0]),), ())
    factors = torch.tensor([1.0, 8.0, 0.5])
    # The widest class is 8 * 1, above 0.5 * 4.
    wanted = (8 / 255) ** 2 * (2 / 8**2 + 3 / 0.5**2)
    torch.testing.assert_close(noise.total(factors.log()), torch.tensor(wanted))


def test_values_on_one_grid_share_the_widest_range() -> None:
    one, other = _value([1.0], [1.0]), _value([3.0], [1.0])
    alone = RoundingNoise(2, (one,), ()).total(torch.zeros(2))
    together = RoundingNoise(2, (one, other), ()).total(torch.zeros(2))
    torch.testing.assert_close(together, 2 * 9 * alone)


def test_the_noise_of_a_weight_is_its_rows_steps_times_the_input() -> None:
    weight = WeightNoise(
        classes=torch.tensor([[1, 2]]),
        largest=torch.tensor([[[1.0, 2.0], [4.0, 1.0]]]),
        power=torch.tensor([[3.0, 5.0]]),
        sensitivity=torch.tensor([[1.0, 10.0]]),
        levels=14.0,
    )
    total = RoundingNoise(3, (), (weight,)).total(torch.tensor([1.0, 2.0, 1.0]).log())
    # Rows are max(1/2, 2) = 2 and max(4/2, 1) = 2 wide, the input has 4 * 3 + 5.
    torch.testing.assert_close(total, torch.tensor((1 * 4 + 10 * 4) * (4 * 3 + 5) / 14**2))


def test_classes_of_one_value_end_with_like_ranges() -> None:
    noise = RoundingNoise(4, (_value([1.0, 4.0, 0.5], [1.0, 1.0, 1.0]),), ())
    found = fewest_noise(noise)[1:] * torch.tensor([1.0, 4.0, 0.5])
    assert float(found.max() / found.min()) == pytest.approx(1, abs=0.1)
    assert noise.total(fewest_noise(noise).float().log()) < noise.total(torch.zeros(4))


def test_class_0_keeps_the_factor_1() -> None:
    value = ValueNoise("x", torch.tensor([0, 1]), torch.zeros(2), torch.tensor([1.0, 9.0]), torch.ones(2), 255.0)
    found = fewest_noise(RoundingNoise(2, (value,), ()))
    assert found[0] == 1
    assert float(found[1]) == pytest.approx(1 / 9, rel=0.15)


@pytest.mark.parametrize("name", ["residual", "attention", "grouped", "twice"])
def test_the_pass_changes_weights_and_no_answer(name: str) -> None:
    program, x = _prepared(name), images(8)
    done = EqualizeChannels(CalibrationSet((x,)))(program)
    assert done[ChannelScales].paths
    torch.testing.assert_close(done.module(x), program.module(x), rtol=1e-4, atol=1e-5)
    assert str(done.module.graph) == str(program.module.graph)


def test_without_a_free_factor_nothing_changes() -> None:
    program = _prepared("relu6")
    done = EqualizeChannels(CalibrationSet((images(),)))(program)
    assert not done[ChannelScales].paths
    assert done.module.state_dict().keys() == program.module.state_dict().keys()


def test_factors_that_change_next_to_nothing_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = _prepared("residual"), CalibrationSet((images(8),))
    assert EqualizeChannels(x)(program)[ChannelScales].paths
    monkeypatch.setattr("fxquant.passes.equalization.equalize_channels.PREDICTED", 5.0)
    assert not EqualizeChannels(x)(program)[ChannelScales].paths


def test_a_channel_that_is_much_smaller_is_scaled_up() -> None:
    model = network("relu")
    scale_channel(model, 2, 0.01)
    program = flow.prepare(capture(model, (images(2),)), Settings(bits=(8,)))
    scales = EqualizeChannels(CalibrationSet((images(8),)))(program)[ChannelScales]
    factors = scales.multiplied["one.weight"].flatten()
    assert factors.argmax() == 2
    assert factors[2] > 10 * factors.median()


def test_folded_statistics_still_recover_the_input_of_the_normalization() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3)
    ).eval()
    program = flow.prepare(capture(model, (images(2),)), Settings(bits=(8,)))
    known = program[NormStatistics].folded["conv2d"]
    changed = scaled(program, ChannelScales({"0.weight": torch.full((4, 1, 1, 1), 2.0, dtype=torch.float64)}))
    now = changed[NormStatistics].folded["conv2d"]
    y = torch.randn(4)
    torch.testing.assert_close(
        (2 * y - now.shift) / now.factor + now.mean, (y - known.shift) / known.factor + known.mean
    )


def test_factors_of_another_network_are_refused() -> None:
    program = _prepared("relu")
    with pytest.raises(FileFormatError, match=r"factors of 'one\.weight' do not fit its shape"):
        scaled(program, ChannelScales({"one.weight": torch.ones(5, 1, 1, 1, dtype=torch.float64)}))


def test_a_sample_of_the_rows_counts_as_all(monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = _prepared("grouped"), CalibrationSet((images(8),))
    module = without_observers(program.module)
    factors = channel_factors(module, x.inputs)
    whole = measured_noise(program, module, factors, x, 8)
    monkeypatch.setattr("fxquant.passes.equalization.measure_noise.MOST_ROWS", 2)
    some = measured_noise(program, module, factors, x, 8)
    assert [each.largest.shape[1] for each in whole.weights] == [6, 2, 2, 3]
    assert [each.largest.shape[1] for each in some.weights] == [2, 2, 2, 2]
    logarithms = torch.zeros(factors.count)
    assert float(some.total(logarithms)) == pytest.approx(float(whole.total(logarithms)), rel=0.5)
