"""ONNX models as others write them, made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

node = helper.make_node
ONES = np.ones((2, 2, 1, 1), dtype=np.int64)
IMAGE = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 4, 4])
RESULT = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2, 4, 4])


def stored(name: str, values: object, kind: int = TensorProto.FLOAT) -> TensorProto:
    """Return an initializer of any element type."""
    array = np.asarray(values)
    return helper.make_tensor(name, kind, array.shape, array.flatten().tolist())


def model(nodes: list[onnx.NodeProto], initializers: list[TensorProto], opset: int = 21) -> onnx.ModelProto:
    """Return a model of one image in, one result out."""
    graph = helper.make_graph(nodes, "net", [IMAGE], [RESULT], initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="somebody")
    made.ir_version = 10
    return made


def float_net() -> onnx.ModelProto:
    """Return two convolutions of one name and a product of two activations."""
    weight = stored("w", ONES)
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="same"),
        node("Conv", ["a", "w"], ["b"], name="same"),
        node("MatMul", ["a", "b"], ["y"]),
    ]
    return model(nodes, [weight])


def quantized_net(
    weight_type: int = TensorProto.INT8,
    cast: bool = False,
    input_quantized: bool = True,
    output_quantized: bool = True,
    operator: str = "Conv",
    zero_point: int = 0,
) -> onnx.ModelProto:
    """Return one convolution between quantizers, unnamed, with a clip behind it."""
    nodes, read, weight = [], "x", "w"
    if input_quantized:
        nodes += [node("QuantizeLinear", ["x", "s", "z"], ["xq"])]
        nodes += [node("DequantizeLinear", ["xq", "s", "z"], ["xf"])]
        read = "xf"
    zero = [stored("wz", 0, weight_type)]
    if cast:
        nodes += [node("Cast", ["w"], ["wc"], to=TensorProto.INT8)]
        weight, zero = "wc", [stored("wz", 0, TensorProto.INT8)]
    nodes += [node("DequantizeLinear", [weight, "s", "wz"], ["wf"])]
    nodes += [node(operator, [read, "wf"], ["c"]), node("Relu", ["c"], ["r"])]
    if output_quantized:
        nodes += [node("QuantizeLinear", ["r", "s", "z"], ["rq"])]
        nodes += [node("DequantizeLinear", ["rq", "s", "z"], ["y"])]
    else:
        nodes += [node("Identity", ["r"], ["y"])]
    initializers = [
        stored("s", 0.5),
        stored("z", zero_point, TensorProto.UINT8),
        stored("w", ONES, weight_type),
    ]
    return model(nodes, [*initializers, *zero])


def integer_net() -> onnx.ModelProto:
    """Return a convolution in the operator format: integers in the operator itself."""
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("QLinearConv", ["xq", "s", "z", "w", "s", "wz", "s", "z"], ["yq"], name="conv"),
        node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
    ]
    weights = stored("w", ONES, TensorProto.INT8)
    return model(
        nodes, [stored("s", 0.5), stored("z", 3, TensorProto.UINT8), stored("wz", 0, TensorProto.INT8), weights]
    )


def branching_net() -> onnx.ModelProto:
    """Return a convolution inside both branches of an If, with a weight of the outer graph."""
    inside = [
        helper.make_graph(
            [node("Conv", ["x", "w"], [f"{name}_out"], name=name)],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)],
        )
        for name in ("yes", "no")
    ]
    branch = node("If", ["c"], ["y"], then_branch=inside[0], else_branch=inside[1])
    return model([branch], [stored("w", ONES), stored("c", True, TensorProto.BOOL)])


def external_net(folder: Path) -> Path:
    """Write a model whose weight lies in another file, as large models have it."""
    made = float_net()
    tensor = numpy_helper.from_array(np.ones((2, 2, 1, 1), dtype=np.float32), "w")
    made.graph.initializer[0].CopyFrom(tensor)
    path = folder / "external.onnx"
    onnx.save_model(made, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path
