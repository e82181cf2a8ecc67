from __future__ import annotations

import numpy as np
import torch

from fxquant.core.run import CalibrationSet, embed_shift
from fxquant.passes.sensitivity import measure_singles
from tests.scoring import full_forward, full_forward_losses, inputs, scorer, simulated

IMAGES = CalibrationSet(inputs("plain", 6))


def test_losses_per_image_in_the_order_of_the_images() -> None:
    each = scorer(simulated("plain"), IMAGES)
    found = measure_singles(each)
    assert found.losses.shape == (12, 6)
    for column, candidate in enumerate(each.candidates):
        expected = full_forward_losses("plain", IMAGES, "kl", candidate).numpy()
        np.testing.assert_allclose(found.losses[column], expected, rtol=1e-4, atol=1e-9)


def test_inner_products_over_all_images_and_batches() -> None:
    each = scorer(simulated("plain"), IMAGES)
    assert len(each.parts) == 2
    found = measure_singles(each)
    reference = full_forward("plain", 6)
    shifts = [full_forward("plain", 6, candidate) - reference for candidate in each.candidates]
    embedded = torch.stack([embed_shift("kl", reference, shift) for shift in shifts]).double()
    products = torch.einsum("inf,jnf->nij", embedded, embedded)
    np.testing.assert_allclose(found.gram, products.mean(0).numpy(), rtol=1e-3, atol=1e-8)
    spread = products.std(0).numpy() / 6**0.5
    np.testing.assert_allclose(found.gram_stderr, spread, rtol=1e-2, atol=1e-8)


def test_one_base_pass_and_at_most_one_pass_per_candidate() -> None:
    found = measure_singles(scorer(simulated("plain"), IMAGES))
    assert 6 < found.evaluations < 6 * 13
