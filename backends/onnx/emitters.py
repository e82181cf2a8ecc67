"""How each ATen op is written in ONNX: one function per op, found through `EMITTERS`.

A function returns the name of the value it made, or None where its op cannot be written this way; the exporter of
PyTorch then writes that node (`fxquant.backends.onnx.splice`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import isinf
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch.fx import Node

from fxquant.backends.onnx.blocks import block_linear
from fxquant.backends.onnx.lowering import Lowering, dims, static_shape
from fxquant.backends.onnx.rewrites import barrier, pad_integers, padded_conv, spread
from fxquant.backends.qdq_ops import dequantize, quantize, stored_channels
from fxquant.core.ir import arguments, clip_bounds, constant

aten = torch.ops.aten
FLOAT = TensorProto.FLOAT
Emitter = Callable[[Lowering, Node], str | tuple[str, ...] | None]

EMITTERS: dict[object, Emitter] = {}
"""ATen overload, or function of this package -> how it is written."""


def emits(*targets: object) -> Callable[[Emitter], Emitter]:
    """Register a function as the emitter of these targets."""

    def register(emitter: Emitter) -> Emitter:
        EMITTERS.update(dict.fromkeys(targets, emitter))
        return emitter

    return register


def simple(op: str, **attributes: Any) -> Emitter:
    """Return the emitter of an op with one tensor in, one out, and fixed attributes."""

    def emit(lowering: Lowering, node: Node) -> str | None:
        return lowering.write(node, op, [lowering.value(node.args[0])], **attributes)

    return emit


EMITTERS.update(
    {
        barrier: simple("Sum"),
        aten.relu.default: simple("Relu"),
        aten.sigmoid.default: simple("Sigmoid"),
        aten.tanh.default: simple("Tanh"),
        aten.exp.default: simple("Exp"),
        aten.sqrt.default: simple("Sqrt"),
        aten.neg.default: simple("Neg"),
        aten.hardswish.default: simple("HardSwish"),
        aten.hardsigmoid.default: simple("HardSigmoid", alpha=1 / 6, beta=0.5),
    }
)


@emits(aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default, aten.dropout.default)
def _identity(lowering: Lowering, node: Node) -> str | None:
    if node.target is aten.dropout.default and arguments(node)["train"]:
        return None
    return lowering.value(node.args[0])


@emits(quantize)
def _quantize(lowering: Lowering, node: Node) -> str | None:
    x, scale, zero_point, qmin, qmax = node.args
    zero = lowering.zero_point(zero_point)
    q = lowering.write(node, "QuantizeLinear", [lowering.value(x), lowering.value(scale), zero])
    if (qmin, qmax) == (0, 255):
        return q
    # QuantizeLinear saturates at the ends of uint8; a narrower grid is clipped on the integers.
    low, high = (lowering.constant(np.array(end, np.uint8), f"u8_{end}") for end in (qmin, qmax))
    return lowering.write(node, "Clip", [q, low, high])


@emits(dequantize)
def _dequantize(lowering: Lowering, node: Node) -> str | None:
    q, scale, zero_point = node.args
    inputs = [lowering.value(q), lowering.value(scale), lowering.zero_point(zero_point)]
    return lowering.write(node, "DequantizeLinear", inputs)


@emits(pad_integers)
def _pad_integers(lowering: Lowering, node: Node) -> str | None:
    q, widths, zero_point = node.args
    assert isinstance(widths, list | tuple)
    pads = lowering.integers(lowering.pads(node, [int(str(w)) for w in widths]))
    return lowering.write(node, "Pad", [lowering.value(q), pads, lowering.zero_point(zero_point)])


@emits(aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding)
def _conv(lowering: Lowering, node: Node) -> str | None:
    given = arguments(node)
    axes = len(dims(given["weight"])) - 2
    if len(dims(given["input"])) != axes + 2:
        return None
    dilation = spread(given["dilation"], axes)
    if isinstance(given["padding"], str):
        kernel = static_shape(given["weight"])[2:]
        total = [d * (k - 1) if given["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = spread(given["padding"], axes) * 2
    operands = (given["input"], given["weight"], given["bias"])
    return _write_conv(lowering, node, operands, spread(given["stride"], axes), pads, dilation, given["groups"])


@emits(padded_conv)
def _padded_conv(lowering: Lowering, node: Node) -> str | None:
    x, weight, bias, stride, pads, dilation, groups = node.args
    axes = len(dims(weight)) - 2
    operands = (x, weight, bias)
    return _write_conv(
        lowering, node, operands, spread(stride, axes), spread(pads, 2 * axes), spread(dilation, axes), groups
    )


def _write_conv(
    lowering: Lowering,
    node: Node,
    operands: tuple[Any, Any, Any],
    stride: list[int],
    pads: list[int],
    dilation: list[int],
    groups: Any,
) -> str:
    inputs = [lowering.value(operand) for operand in operands if operand is not None]
    given: dict[str, Any] = {"strides": stride, "dilations": dilation, "pads": pads, "group": int(groups)}
    # What is not said is 1, and no padding.
    said = {key: value for key, value in given.items() if np.any(np.array(value) != (key != "pads"))}
    return lowering.write(node, "Conv", inputs, name=lowering.layer_name(node), **said)


@emits(aten.linear.default)
def _linear(lowering: Lowering, node: Node) -> str | None:
    x, weight, *rest = node.args
    bias = [lowering.value(b) for b in rest if b is not None]
    if len(dims(weight)) != 2 or len(dims(x)) < 2:
        return None
    name = lowering.layer_name(node)
    if len(dims(x)) == 2:
        return lowering.write(node, "Gemm", [lowering.value(x), lowering.value(weight), *bias], name=name, transB=1)
    # A transposed weight in the graph would be between its DequantizeLinear and the product and stop the fusion.
    product = lowering.write(node, "MatMul", [lowering.value(x), lowering.transposed(weight)], name=name)
    return lowering.write(node, "Add", [product, *bias]) if bias else product


@emits(block_linear)
def _block_linear(lowering: Lowering, node: Node) -> str | None:
    x, q, scale, bias, block, bits = node.args
    name = str(node.meta["layer"])
    inputs = [
        lowering.constant_of(q, f"{name}.weight", int(str(bits))),
        lowering.constant_of(scale, f"{name}.weight_scale"),
    ]
    weight = lowering.builder.node("DequantizeLinear", inputs, f"{name}.weight_dq", axis=0, block_size=block)
    # Between two DequantizeLinear the product would be taken for one of integers, for which there is no kernel.
    rows = (
        lowering.write(node, "Sum", [lowering.value(x)])
        if getattr(x, "target", None) is dequantize
        else lowering.value(x)
    )
    product = lowering.write(node, "MatMul", [rows, weight], name=name)
    return product if bias is None else lowering.write(node, "Add", [product, lowering.value(bias)])


@emits(aten.matmul.default, aten.bmm.default)
def _matmul(lowering: Lowering, node: Node) -> str | None:
    return lowering.write(node, "MatMul", [lowering.value(operand) for operand in node.args[:2]])


BINARY: dict[object, str] = {
    aten.add.Tensor: "Add",
    aten.add.Scalar: "Add",
    aten.sub.Tensor: "Sub",
    aten.sub.Scalar: "Sub",
    aten.mul.Tensor: "Mul",
    aten.mul.Scalar: "Mul",
    aten.div.Tensor: "Div",
    aten.div.Scalar: "Div",
}


@emits(*BINARY)
def _binary(lowering: Lowering, node: Node) -> str | None:
    given = arguments(node)
    operands = [given["self"], given["other"]]
    kinds = {o.meta["val"].dtype for o in operands if isinstance(o, Node) and isinstance(o.meta["val"], torch.Tensor)}
    numbers = [o for o in operands if isinstance(o, int | float)]
    # Integers divide and promote differently in torch and in ONNX.
    if given.get("alpha", 1) != 1 or kinds != {torch.float32}:
        return None
    if len(numbers) + sum(isinstance(o, Node) and isinstance(o.meta["val"], torch.Tensor) for o in operands) != 2:
        return None
    inputs = [lowering.number(o) if isinstance(o, int | float) else lowering.value(o) for o in operands]
    return lowering.write(node, BINARY[node.target], inputs)


@emits(aten.relu6.default, aten.hardtanh.default, aten.clamp.default)
def _clip(lowering: Lowering, node: Node) -> str | None:
    if len(node.all_input_nodes) > 1 or node.meta["val"].dtype != torch.float32:
        return None
    ends = ["" if isinf(end) else lowering.number(end) for end in clip_bounds(node)]
    return lowering.write(node, "Clip", [lowering.value(node.args[0]), *ends])


@emits(aten.silu.default)
def _silu(lowering: Lowering, node: Node) -> str | None:
    x = lowering.value(node.args[0])
    return lowering.write(node, "Mul", [x, lowering.write(node, "Sigmoid", [x])])


@emits(aten.gelu.default)
def _gelu(lowering: Lowering, node: Node) -> str | None:
    kind = arguments(node)["approximate"]
    return lowering.write(node, "Gelu", [lowering.value(node.args[0])], approximate=kind)


@emits(aten.leaky_relu.default)
def _leaky_relu(lowering: Lowering, node: Node) -> str | None:
    slope = arguments(node)["negative_slope"]
    return lowering.write(node, "LeakyRelu", [lowering.value(node.args[0])], alpha=float(slope))


@emits(aten.prelu.default)
def _prelu(lowering: Lowering, node: Node) -> str | None:
    x, slope = node.args
    known = constant(lowering.module, slope)
    if known is None:
        return None
    value, slopes = lowering.value(x), known.detach().reshape(-1, *[1] * (len(dims(node)) - 2)).numpy()
    factor = lowering.constant(slopes, f"{node.name}_slope")
    # ONNX Runtime's own PRelu takes four times as long (0.75 ms for 200,000 values, a maximum 0.18 ms).
    if ((slopes >= 0) & (slopes <= 1)).all():
        return lowering.write(node, "Max", [value, lowering.write(node, "Mul", [value, factor])])
    above = lowering.write(node, "Relu", [value])
    below = lowering.write(node, "Mul", [lowering.write(node, "Sub", [value, above]), factor])
    return lowering.write(node, "Add", [above, below])


@emits(aten.softmax.int, aten._softmax.default)
def _softmax(lowering: Lowering, node: Node) -> str | None:
    given = arguments(node)
    if given.get("dtype") is not None or given.get("half_to_float"):
        return None
    return lowering.write(node, "Softmax", [lowering.value(node.args[0])], axis=given["dim"])


@emits(aten.layer_norm.default)
def _layer_norm(lowering: Lowering, node: Node) -> str | None:
    given = arguments(node)
    shape = given["normalized_shape"]
    gain = given["weight"]
    if any(not isinstance(size, int) for size in shape):
        return None
    ones = np.ones(tuple(shape), np.float32)
    inputs = [lowering.value(node.args[0]), lowering.constant(ones, "ones") if gain is None else lowering.value(gain)]
    if given["bias"] is not None:
        inputs.append(lowering.value(given["bias"]))
    return lowering.write(node, "LayerNormalization", inputs, axis=-len(shape), epsilon=float(given["eps"]))


@emits(aten._native_batch_norm_legit_no_training.default)
def _batch_norm(lowering: Lowering, node: Node) -> str | None:
    given = arguments(node)
    parts = [given[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if any(part is None for part in parts) or any(user.args[1] != 0 for user in node.users):
        return None
    inputs = [lowering.value(part) for part in (node.args[0], *parts)]
    return lowering.write(node, "BatchNormalization", inputs, epsilon=float(given["eps"]))


@emits(operator.getitem)
def _getitem(lowering: Lowering, node: Node) -> str | None:
    source, index = node.args
    return lowering.member(source, index)


@emits(aten.embedding.default)
def _embedding(lowering: Lowering, node: Node) -> str | None:
    table, index = node.args[0], lowering.value(node.args[1])
    if not isinstance(table, Node) or table.target is not stored_channels:
        return lowering.write(node, "Gather", [lowering.value(table), index])
    # Rows are looked up as integers, and only these are made float.
    integers, scales = lowering.stored_integers(table)
    rows = lowering.builder.node("Cast", [lowering.write(node, "Gather", [integers, index])], "rows", to=FLOAT)
    column = lowering.builder.node("Unsqueeze", [scales, lowering.integers([1])], "scales")
    return lowering.write(node, "Mul", [rows, lowering.write(node, "Gather", [column, index])])
