from __future__ import annotations

import numpy as np
import pytest
import torch

from fxquant.core.ir import Sites
from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity import ESTIMATORS, tf_idf
from tests.scoring import inputs, scorer, simulated


def test_three_images_by_hand() -> None:
    # Every image's sum is 4. Channel 0 is above its mean 1 at image 0, channel 1 above 4/3 at image 2, channel 2 above
    # 5/3 at images 1 and 2, so that its idf is log(3 / 3).
    pooled = np.array([[3.0, 0, 0], [1, 1, 2], [0, 3, 2]])
    assert tf_idf(pooled) == pytest.approx((3 / 4 * np.log(1.5) + 2 / 4 * np.log(1.5) + 5 / 8 * 0.0) / 3)


def test_channels_that_answer_to_one_image_each_separate_best() -> None:
    alone = tf_idf(np.eye(4))
    assert alone == pytest.approx(np.log(2))
    assert alone > tf_idf(np.eye(4) + 0.5) > tf_idf(np.ones((4, 4)))
    assert tf_idf(np.zeros((4, 4))) == 0.0


@pytest.mark.parametrize(
    ("name", "price"), [("separability", lambda score: score), ("separability_exp", lambda score: np.exp(-score))]
)
def test_prices_of_a_network_from_its_layers(name: str, price: np.ufunc) -> None:
    each = scorer(simulated("plain"), CalibrationSet(inputs("plain", 6)))
    found = ESTIMATORS[name].measure(each)
    _, environment = each.replay.forward(each.images.inputs, each.off)
    for k, column in enumerate(each.columns):
        site = each.program[Sites].by_name(column.owner)
        answer = environment[each.replay.by_name[site.nodes[0]]].detach().double().clamp(min=0)
        pooled = answer.mean(dim=(2, 3)) if answer.dim() == 4 else answer
        assert column.weight_bits is not None
        expected = price(tf_idf(pooled.T.numpy())) * (64 - 8 - column.weight_bits)
        assert found.values[k, k] == pytest.approx(expected, rel=1e-6)
    assert found.evaluations == pytest.approx(6)


@pytest.mark.parametrize(("owner", "images_axis"), [("wide", 0), ("attention.in_proj_weight", 1)])
def test_tokens_are_pooled_over_their_positions(owner: str, images_axis: int) -> None:
    images = CalibrationSet(inputs("attention", 4))
    each = scorer(simulated("attention"), images)
    found = ESTIMATORS["separability"].measure(each)
    _, environment = each.replay.forward(images.inputs, each.off)
    k = next(k for k, column in enumerate(each.columns) if column.owner == owner and column.weight_bits == 4)
    answer = environment[each.replay.by_name[each.program[Sites].by_name(owner).nodes[0]]].detach().double()
    pooled = torch.relu(answer).movedim(images_axis, 0).mean(dim=1).T
    assert found.values[k, k] == pytest.approx(tf_idf(pooled.numpy()) * (28 + 24), rel=1e-6)


def test_only_the_first_images_count() -> None:
    many = torch.randn(70, 16, generator=torch.Generator().manual_seed(0))
    other = torch.cat([many[:64], 100 * many[64:]])
    one, two = (
        ESTIMATORS["separability"](scorer(simulated("split"), CalibrationSet((images,)))) for images in (many, other)
    )
    assert np.array_equal(one.values, two.values)
    assert one.evaluations == pytest.approx(64)
