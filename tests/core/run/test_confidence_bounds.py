from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from fxquant.core.run import drop_bound, images_needed, mean_bound, share_bound


@pytest.mark.parametrize(
    ("hits", "images", "confidence", "expected"),
    # Quantiles of Beta(hits + 1, images - hits), from SciPy.
    [(0, 96, 0.95, 0.030723676833), (3, 50, 0.95, 0.147837176364), (10, 200, 0.99, 0.0981819166033), (7, 7, 0.9, 1.0)],
)
def test_a_share_is_bounded_as_clopper_and_pearson_do(
    hits: int, images: int, confidence: float, expected: float
) -> None:
    assert share_bound(hits, images, confidence) == pytest.approx(expected, rel=1e-9)


def test_a_drop_solves_tangos_equation() -> None:
    z = 1.6448536269514722
    for lost, won, images in ((5, 2, 100), (3, 9, 60), (0, 4, 30), (1, 0, 12)):
        d = drop_bound(lost, won, images, 0.95)
        # The likeliest share of won images at this d, found by trying.
        q = np.linspace(max(0.0, -d) + 1e-9, (1 - d) / 2 - 1e-9, 200_001)
        likelihood = lost * np.log(q + d) + won * np.log(q) + (images - lost - won) * np.log1p(-2 * q - d)
        best = q[likelihood.argmax()]
        assert lost - won - images * d == pytest.approx(-z * math.sqrt(images * (2 * best + d * (1 - d))), rel=1e-3)
    assert drop_bound(5, 5, 5, 0.95) == 1.0


@pytest.mark.parametrize(
    ("bound", "truth"),
    [
        (lambda draw: share_bound(int((draw[:80] < 0.03).sum()), 80, 0.95), 0.03),
        (lambda draw: drop_bound(int((draw[:80] < 0.06).sum()), int((draw[:80] > 0.98).sum()), 80, 0.95), 0.04),
        (lambda draw: mean_bound(-np.log(draw[:60]), 0.95), 1.0),
    ],
    ids=["share", "drop", "mean of a skewed loss"],
)
def test_nineteen_of_twenty_draws_are_bounded(bound: Callable[[np.ndarray], float], truth: float) -> None:
    generator = np.random.default_rng(0)
    held = [bound(generator.random(80)) >= truth for _ in range(400)]
    assert np.mean(held) >= 0.92


def test_few_values_bound_no_mean_and_equal_ones_their_own() -> None:
    assert mean_bound(np.ones(9), 0.95) == math.inf
    assert mean_bound(np.full(10, 0.25), 0.95) == 0.25
    # One image of many: three in eight samples do not hold it.
    assert mean_bound(np.eye(20)[0], 0.95) == math.inf
    values = np.random.default_rng(1).random(40)
    assert mean_bound(values, 0.95) == mean_bound(values, 0.95) < mean_bound(values, 0.99)


def test_images_are_counted_up_to_the_limit() -> None:
    assert images_needed(0.25, lambda images: 1 / images) == 4
    assert images_needed(0.0, lambda images: 1 / images) is None
