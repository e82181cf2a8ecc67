"""OpenVINO reads our ONNX files: the same answers as ONNX Runtime, up to how it rounds.

OpenVINO keeps some scales in float where ONNX Runtime requantizes, and multiplies by reciprocals; so single integers
differ by one, and the answers by the few steps asserted here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.data import data_folder
from benchmarks.zoo import NETWORKS
from fxquant.backends.onnx import OnnxOptions, executable, to_onnx
from fxquant.capture import capture
from fxquant.passes import Canonicalize, FoldBatchnorm
from tests.backends.lowered import calibrated, error_in_steps, example, plan_of, simulated
from tests.backends.onnx.test_blocks import simulated as classifier
from tests.backends.onnx.test_stem import STEMS, quantized
from tests.backends.onnx.weight_forms import FORMS, OF_EACH_KIND, with_integers

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason='pip install "fxquant[openvino]" to run it'
)

FOR_OPENVINO = OnnxOptions(runtime="openvino")
IMAGES = 1000
"""Labelled images compared."""
SETTINGS = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}


def openvino(model: bytes) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """Return a function that runs a model in OpenVINO on the CPU."""
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", SETTINGS)

    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        return torch.from_numpy(np.array(compiled([tensor.numpy() for tensor in inputs])[0]))

    return run


@pytest.mark.parametrize("name", ["residual", "separable", "concat", "attention", "tokens"])
@pytest.mark.parametrize("widths", [(8,), (4,), (2,), (4, 8, 2)])
def test_both_runtimes_give_the_same_answers(name: str, widths: tuple[int, ...]) -> None:
    model, inputs = to_onnx(simulated(name, widths), options=FOR_OPENVINO).SerializeToString(), example(name, 16)
    error = error_in_steps(openvino(model)(inputs), executable(model)(inputs))
    assert float(error.mean()) < 0.5
    assert float(error.max()) <= 4.0


def kernels_and_answer(model: bytes, x: Tensor) -> tuple[list[str], Tensor]:
    """Return what executes each layer with a weight, and the answer."""
    import openvino as ov

    core = ov.Core()
    request = core.compile_model(core.read_model(model), "CPU", {**SETTINGS, "PERF_COUNT": True}).create_infer_request()
    request.infer([x.numpy()])
    layers = ("Convolution", "FullyConnected", "MatMul")
    ran = [step.exec_type for step in request.profiling_info if step.node_type.startswith(layers)]
    return ran, torch.from_numpy(np.array(request.get_output_tensor(0).data))


@pytest.mark.parametrize("form", OF_EACH_KIND)
def test_every_form_is_unpacked_beforehand_and_runs_on_the_same_kernels(form: str) -> None:
    module, x = with_integers(FORMS[form])[0], torch.randn(3, 3, 8, 8)
    files = [
        to_onnx(module, options=replace(FOR_OPENVINO, packed=packed)).SerializeToString() for packed in (True, False)
    ]
    (ran, answer), (expected, same) = (kernels_and_answer(file, x) for file in files)
    assert ran == expected
    assert sum(kernel.lower().endswith("_i8") for kernel in ran) >= 5, ran
    assert torch.equal(answer, same)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_both_layouts_of_a_stem_are_read(runtime: str) -> None:
    conv, size = STEMS["3x3 of an odd image"]
    model = to_onnx(quantized(conv, size), options=OnnxOptions.of({"runtime": runtime})).SerializeToString()
    inputs = (torch.randn(8, conv.in_channels, size, size),)
    assert float(error_in_steps(openvino(model)(inputs), executable(model)(inputs)).max()) <= 2.0


@pytest.mark.parametrize("width", [4, 2])
def test_weights_in_blocks_are_read_too(width: int) -> None:
    module, images = classifier(8, width, width)
    model = to_onnx(module, options=OnnxOptions("openvino", weight_only=("hidden", "head"))).SerializeToString()
    # ONNX Runtime rounds the row to 8 bits, OpenVINO multiplies floats.
    assert float(error_in_steps(openvino(model)((images,)), executable(model)((images,))).mean()) < 1.0


@pytest.mark.skipif(data_folder() is None, reason="set FXQUANT_DATA to run the real networks")
@pytest.mark.parametrize("widths", [(8,), (4, 8)])
def test_accuracy_is_that_of_onnx_runtime(widths: tuple[int, ...]) -> None:
    network = NETWORKS["resnet20"]
    images, labels = network.evaluation(IMAGES)
    calibration = network.calibration(16)
    program = FoldBatchnorm()(Canonicalize()(capture(network.factory(), (calibration[:2],))))
    module = plan_of(calibrated(program, (calibration,), widths=(4, 8)), widths)
    model = to_onnx(module, options=FOR_OPENVINO).SerializeToString()
    answers = [run((images,)) for run in (openvino(model), executable(model))]
    tops = [answer.argmax(dim=1) for answer in answers]
    assert float((tops[0] == tops[1]).double().mean()) >= 0.99
    right = [int((top == labels).sum()) for top in tops]
    assert abs(right[0] - right[1]) <= IMAGES // 200
    assert float(error_in_steps(*answers).mean()) < 0.75


@pytest.mark.skipif(data_folder() is None, reason="needs the benchmark data folder: set FXQUANT_DATA")
@pytest.mark.parametrize("width", [8, 4, 3])
def test_every_linear_layer_of_a_transformer_runs_on_integers(width: int) -> None:
    import openvino as ov

    images = NETWORKS["deit_tiny"].calibration(4)
    program = calibrated(
        FoldBatchnorm()(Canonicalize()(capture(NETWORKS["deit_tiny"].factory(), (images,)))), (images,)
    )
    core = ov.Core()
    model = core.read_model(to_onnx(plan_of(program, (width,)), options=FOR_OPENVINO).SerializeToString())
    model.reshape([1, 3, 224, 224])
    request = core.compile_model(model, "CPU", {**SETTINGS, "PERF_COUNT": True}).create_infer_request()
    request.infer([images[:1].numpy()])
    ran = [step.exec_type for step in request.profiling_info if step.node_type.startswith("FullyConnected")]
    assert len(ran) == 49
    assert all(kernel.lower().endswith("_i8") for kernel in ran), ran
