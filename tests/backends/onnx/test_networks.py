"""What ONNX Runtime makes of the real networks, read from its optimized graph."""

from __future__ import annotations

from functools import cache

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from benchmarks.data import data_folder
from benchmarks.zoo import NETWORKS
from fxquant.backends import backend
from fxquant.backends.onnx import executable, kernel_report, stray_conversions, to_onnx
from fxquant.capture import capture
from fxquant.passes import Canonicalize, FoldBatchnorm
from tests.backends.lowered import calibrated, error_in_steps, plan_of

needs_data = pytest.mark.skipif(data_folder() is None, reason="set FXQUANT_DATA to run the real networks")

BORDERS = {"deit_tiny": 51, "dscnn": 1, "mobilenet_v2": 1, "resnet20": 1, "squeezenet": 2, "imdn": 20}
"""Network -> QuantizeLinear and DequantizeLinear left; where it is one, it is the image's own.

DeiT computes layer norms, GELU and attention in float, so each of its 49 linear layers has a quantizer of its own;
imdn's attention over channels is float, as squeezenet's last pool is.
"""
STEMS = {"mobilenet_v2", "squeezenet", "dscnn"}
"""Networks that begin with a convolution of stride 2 on at most three channels."""


@cache
def model(name: str) -> onnx.ModelProto:
    """Return the file of a network, weights of 8 and 4 bits in turn."""
    network = NETWORKS[name]
    images = network.calibration(2)
    program = FoldBatchnorm()(Canonicalize()(capture(network.factory(), (images,))))
    return to_onnx(plan_of(calibrated(program, (images,), widths=(4, 8)), (8, 4)))


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", sorted(BORDERS))
def test_every_layer_runs_on_integers_and_no_conversion_is_stray(name: str) -> None:
    report = kernel_report(model(name).SerializeToString())
    assert report.float_layers == ()
    assert report.stray == ()
    assert report.conversions == BORDERS[name]
    if name != "deit_tiny":
        # Products of two activations are float on purpose.
        assert report.float_products == 0


@needs_data
@pytest.mark.parametrize("name", sorted(BORDERS))
def test_the_file_is_valid_and_readable(name: str) -> None:
    file = model(name)
    onnx.checker.check_model(file, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(file, check_type=True, strict_mode=True, data_prop=True)
    known = {entry.name for entry in inferred.graph.value_info}
    for node in file.graph.node:
        assert set(node.output) <= known | {entry.name for entry in file.graph.output}
    operators = [node.op_type for node in file.graph.node]
    assert operators.count("SpaceToDepth") == (name in STEMS)
    layers = {node.name for node in file.graph.node if node.op_type in ("Conv", "Gemm", "MatMul") and node.name}
    modules = {path for path, _ in NETWORKS[name].factory().named_modules()}
    assert layers <= modules, "a layer is called by the path of its module"


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", ["imdn", "resnet20"])
def test_a_fully_convolutional_file_takes_images_of_any_size(name: str) -> None:
    network = NETWORKS[name]
    images = network.calibration(2)
    program = capture(network.factory(), (images,), dynamic_image=True)
    program = FoldBatchnorm()(Canonicalize()(program))
    module = plan_of(calibrated(program, (images,), widths=(4, 8)), (8, 4))
    file = to_onnx(module)
    onnx.checker.check_model(file, full_check=True)
    sizes = [
        [d.dim_param or d.dim_value for d in e.type.tensor_type.shape.dim]
        for e in (*file.graph.input, *file.graph.output)
    ]
    assert sizes[0] == ["batch", 3, "height", "width"]
    assert sizes[1] == (["batch", 3, "2*height", "2*width"] if name == "imdn" else ["batch", 10])
    report = kernel_report(file.SerializeToString())
    assert (report.float_layers, report.conversions) == ((), BORDERS[name])
    assert len(report.stray) == report.operators.get("Concat", 0) == 0
    run = executable(file.SerializeToString())
    for count, height, width in ((1, 48, 64), (2, 33, 47)):
        x = torch.rand(count, 3, height, width)
        error = error_in_steps(run((x,)), backend("reference").compile(module, (x,))((x,)))
        assert float(error.mean()) < 1.5


def graph(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    return helper.make_graph(nodes, "g", ends[:1], ends[1:])


def quantize(source: str, result: str) -> onnx.NodeProto:
    return helper.make_node("QuantizeLinear", [source, "s", "z"], [result])


def dequantize(source: str, result: str) -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", [source, "s", "z"], [result])


def test_borders_are_not_stray_and_what_is_not_one_is() -> None:
    node = helper.make_node
    product = node("QGemm", ["r", "s", "z", "w"], ["g"])
    assert stray_conversions(graph(quantize("x", "q"), node("Reshape", ["q", "n"], ["r"]), product)) == ()
    assert stray_conversions(graph(product, node("Transpose", ["g"], ["t"]), dequantize("t", "y"))) == ()
    # A pair with nothing between, weights unpacked at every run, and a change of scale.
    assert stray_conversions(graph(quantize("x", "q"), dequantize("q", "y"))) == ("q", "y")
    assert stray_conversions(graph(dequantize("w", "d"), node("Conv", ["x", "d"], ["y"]))) == ("d",)
    again = graph(
        node("QLinearAdd", ["x"], ["a"]), dequantize("a", "d"), quantize("d", "q"), node("QGemm", ["q"], ["y"])
    )
    assert stray_conversions(again) == ("q",)
    branching = [node("Split", [f"v{k}"], [f"a{k}", f"b{k}"]) for k in range(60)]
    joining = [node("Concat", [f"a{k}", f"b{k}"], [f"v{k + 1}"]) for k in range(60)]
    chain = [each for pair in zip(branching, joining, strict=True) for each in pair]
    assert stray_conversions(graph(quantize("x", "v0"), *chain, dequantize("v60", "y"))) == ("v0", "y")
