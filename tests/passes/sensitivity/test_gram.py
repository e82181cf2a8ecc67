from __future__ import annotations

import numpy as np
import pytest
import torch

from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity import ESTIMATORS
from tests.scoring import full_forward, inputs, scorer, simulated

gram = ESTIMATORS["gram"]


IMAGES = CalibrationSet(inputs("plain", 6))


def test_cross_terms_are_the_gauss_newton_products_of_logit_shifts() -> None:
    found = gram(scorer(simulated("plain"), IMAGES))
    reference = full_forward("plain", 6).double()
    p = torch.softmax(reference, 1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    shifts = [full_forward("plain", 6, candidate).double() - reference for candidate in found.candidates]
    for i, one in enumerate(found.candidates):
        for j, other in enumerate(found.candidates):
            if one.site != other.site:
                expected = torch.einsum("nc,ncd,nd->n", shifts[i], fisher, shifts[j]).mean()
                assert found.values[i, j] + found.values[j, i] == pytest.approx(float(expected), rel=1e-3, abs=1e-7)


def test_positive_semidefinite_where_the_loss_is_quadratic() -> None:
    found = gram(scorer(simulated("split", (4, 6, 8)), CalibrationSet(inputs("split", 24)), "mse"))
    eigenvalues = np.linalg.eigvalsh(found.values)
    assert eigenvalues[0] >= -1e-6 * eigenvalues[-1]
