"""The contract of every registered backend: it computes what the simulation says."""

from __future__ import annotations

import pytest
import torch

from benchmarks.data import data_folder
from benchmarks.zoo import NETWORKS
from fxquant.backends import BACKENDS, backend
from fxquant.capture import capture
from fxquant.core.run import model_outputs
from fxquant.passes import Canonicalize, FoldBatchnorm
from tests.backends.lowered import QUANTIZED, calibrated, error_in_steps, example, plan_of, simulated


@pytest.mark.parametrize("runtime", sorted(BACKENDS))
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("widths", [(8,), (4, 8, 2)])
def test_answers_are_the_simulations_to_a_step(runtime: str, name: str, widths: tuple[int, ...]) -> None:
    module, inputs = simulated(name, widths), example(name, 6)
    answer = backend(runtime).compile(module, inputs, threads=1)(inputs)
    error = error_in_steps(answer, model_outputs(module, inputs))
    assert float(error.max()) <= 2.5
    assert float(error.mean()) < 0.2


@pytest.mark.parametrize("runtime", sorted(BACKENDS))
def test_a_target_is_registered_under_its_own_name(runtime: str) -> None:
    assert backend(runtime).target.name == runtime


@pytest.mark.skipif(data_folder() is None, reason="set FXQUANT_DATA to run the real networks")
def test_resnet20_predicts_the_same_classes_in_every_runtime() -> None:
    network = NETWORKS["resnet20"]
    images, labels = network.evaluation()
    cases = network.calibration(32)
    folded = FoldBatchnorm()(Canonicalize()(capture(network.factory(), (cases[:2],))))
    program = calibrated(folded, (cases,), widths=(4, 8))
    for widths in ((8,), (8, 4)):
        module = plan_of(program, widths)
        expected = model_outputs(module, (images,))
        for runtime in BACKENDS:
            run = backend(runtime).compile(module, (cases[:2],))
            answer = torch.cat([run((images[k : k + 64],)) for k in range(0, len(images), 64)])
            agreement = (answer.argmax(dim=1) == expected.argmax(dim=1)).double().mean()
            assert float(agreement) > 0.995, (runtime, widths)
            assert float(error_in_steps(answer, expected).mean()) < 0.2, (runtime, widths)
    assert len(labels) == len(images) == 1017
