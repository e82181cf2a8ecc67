from __future__ import annotations

import onnx
import pytest
import torch

from fxquant.backends import to_qdq
from fxquant.backends.onnx import OnnxOptions, add_biases, executable, fuse_integers, to_onnx
from tests.backends.lowered import error_in_steps, example, simulated
from tests.backends.onnx.test_blocks import simulated as classifier

FOR_OPENVINO = OnnxOptions(runtime="openvino")


@pytest.mark.parametrize("name", ["residual", "padded", "sequence", "attention"])
def test_biases_are_nodes_and_answers_the_same(name: str) -> None:
    module, inputs = simulated(name, (8,)), example(name, 6)
    plain, changed = fuse_integers(to_qdq(module)), add_biases(fuse_integers(to_qdq(module)))
    with torch.no_grad():
        assert torch.allclose(changed(*inputs), plain(*inputs), atol=1e-5)
    model = to_onnx(module, options=FOR_OPENVINO)
    onnx.checker.check_model(model, full_check=True)
    assert all(len(node.input) == 2 for node in model.graph.node if node.op_type == "Conv")
    run, expected = executable(model.SerializeToString()), executable(to_onnx(module).SerializeToString())
    assert float(error_in_steps(run(inputs), expected(inputs)).max()) <= 2.5


def test_blocks_are_not_stored_in_two_bits() -> None:
    module, _ = classifier(2)
    model = to_onnx(module, options=OnnxOptions("openvino", weight_only=("head",)))
    assert onnx.TensorProto.INT2 not in {tensor.data_type for tensor in model.graph.initializer}
    assert model.opset_import[0].version == 21
