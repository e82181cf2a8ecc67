"""Each formula against the kernel it stands for, with scales that put many sums next to a tie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxquant.backends import backend
from fxquant.backends.exact import Requantization, Sums
from fxquant.backends.int8 import (
    ByteGrid,
    ConvGeometry,
    ConvGrids,
    IntegerAdd,
    IntegerAveragePool,
    IntegerConv,
    IntegerLinear,
    IntegerMul,
    LinearEnd,
    Quantize,
    conv_joins_scales,
)
from fxquant.backends.onnx import open_session, session_options

EMPTY = GraphModule({}, Graph())
ORT, EAGER = (backend(name).runtimes[name].formulas(EMPTY) for name in ("onnxruntime", "fx_int8"))
UINT8 = TensorProto.UINT8
VNNI = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="oneDNN takes other kernels without VNNI")


GRAPH = Graph()
X = GRAPH.placeholder("x")
PAIR = GRAPH.call_function(torch.ops.aten.add.Tensor, (X, X))
MEAN = GRAPH.call_function(torch.ops.aten.mean.dim, (X, [2, 3], True))


def join(formulas: Requantization, node: Node, *grids: ByteGrid, kind: str) -> Callable[..., Tensor]:
    """Return the formula of an op without weights; the last grid is that of the output."""
    return formulas.joins[kind](node, grids[:-1], grids[-1])


def whole(levels: Tensor, grid: ByteGrid) -> Tensor:
    return levels.clamp(grid.low, grid.high).to(torch.uint8)


def run(
    op: str, initializers: dict[str, Any], inputs: dict[str, Tensor], kind: int = UINT8, **attributes: Any
) -> Tensor:
    """Run one operator in ONNX Runtime; names of inputs are those of the arguments, in order, `_` for none."""
    order = attributes.pop("order")
    domain = "" if op in ("QLinearConv", "QuantizeLinear") else "com.microsoft"
    node = helper.make_node(op, ["" if n == "_" else n for n in order.split()], ["y"], domain=domain, **attributes)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    entries = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for name, a in arrays.items()
    ]
    constants = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()]
    output = helper.make_tensor_value_info("y", kind, None)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "one", entries, [output], constants)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    answer: NDArray[Any] = open_session(model.SerializeToString(), session_options(1)).run(None, arrays)[0]
    return torch.from_numpy(answer)


def parameters(grid: ByteGrid, name: str) -> dict[str, Any]:
    return {f"s{name}": np.float32(grid.scale), f"z{name}": np.uint8(grid.zero_point)}


def grids(seed: int, count: int) -> list[ByteGrid]:
    random = np.random.default_rng(seed)
    scales = random.uniform(0.01, 0.05, count).astype(np.float32)
    return [ByteGrid(float(scale), int(random.integers(0, 256)), 0, 255) for scale in scales]


def layer(seed: int, weight: Tensor, sums: Tensor, source: ByteGrid, out: ByteGrid) -> tuple[Sums, Tensor]:
    """Return sums whose factor is half an even number's inverse to a few last bits, and the float32 bias."""
    random, channels = np.random.default_rng(seed), len(weight)
    view = (-1, 1, 1) if sums.dim() == 4 else (-1,)
    halves = 2 * max(1, round(float(sums.max() - sums.min()) / 500))
    jitter = 1 + random.integers(-3, 4, channels) * 3e-8
    scales = torch.from_numpy((np.float64(out.scale) / (source.scale * halves) * jitter).astype(np.float32))
    bias = torch.from_numpy(random.integers(-20000, 20000, channels))
    shift = source.zero_point * weight.flatten(1).double().sum(1)
    found = Sums(sums, source.scale, scales.view(view), bias.double().view(view), shift.view(view))
    return found, found.real_bias().flatten()


def conv_case(
    seed: int, channels: int, filters: int, kernel: int, groups: int
) -> tuple[Tensor, Tensor, Tensor, ByteGrid]:
    torch.manual_seed(seed)
    (source,) = grids(seed, 1)
    x = torch.randint(0, 256, (2, channels, 23, 23), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (filters, channels // groups, kernel, kernel), dtype=torch.int8)
    sums = F.conv2d(x.double() - source.zero_point, weight.double(), padding=kernel // 2, groups=groups)
    return x, weight, sums, source


CONVS = [(16, 64, 1, 1), (8, 16, 3, 1), (64, 64, 3, 64), (3, 16, 3, 1)]


@pytest.mark.parametrize("shape", CONVS)
@pytest.mark.parametrize("seed", range(3))
def test_onnxruntime_convolution(seed: int, shape: tuple[int, int, int, int]) -> None:
    x, weight, sums, source = conv_case(seed, *shape)
    (out,) = grids(seed + 50, 1)
    found, _ = layer(seed, weight, sums, source, out)
    assert found.bias is not None
    constants = {"w": weight.numpy(), "sw": found.scales.flatten().numpy(), "zw": np.zeros(len(weight), np.int8)}
    constants |= {**parameters(source, "x"), **parameters(out, "y"), "b": found.bias.flatten().to(torch.int32).numpy()}
    order, pads = "x sx zx w sw zw sy zy b", [shape[2] // 2] * 4
    answer = run("QLinearConv", constants, {"x": x}, order=order, pads=pads, group=shape[3])
    assert torch.equal(answer, whole(ORT.layers["conv"](found, None, None, out), out))


@VNNI
@pytest.mark.parametrize("shape", CONVS)
@pytest.mark.parametrize("low_high", [(0, 255), (20, 200)])
def test_eager_convolution(shape: tuple[int, int, int, int], low_high: tuple[int, int]) -> None:
    x, weight, sums, source = conv_case(7, *shape)
    (wide,) = grids(57, 1)
    out = ByteGrid(wide.scale, wide.zero_point, *low_high)
    found, bias = layer(7, weight, sums, source, out)
    geometry, scales = ConvGeometry((1, 1), (shape[2] // 2,) * 2, (1, 1), shape[3]), found.scales.flatten()
    found = replace(found, joined=conv_joins_scales(tuple(x.shape), tuple(weight.shape), geometry))
    last = x.contiguous(memory_format=torch.channels_last)
    made = IntegerConv(weight, scales, bias, geometry, ConvGrids(source, out))(last)
    assert torch.equal(made, whole(EAGER.layers["conv"](found, None, None, out), out))
    real = IntegerConv(weight, scales, bias, geometry, ConvGrids(source, None))(last)
    assert torch.equal(real, EAGER.layers["conv"](found, None, None, None))


def linear_case(seed: int) -> tuple[Tensor, Tensor, Tensor, ByteGrid]:
    torch.manual_seed(seed)
    (source,) = grids(seed, 1)
    x = torch.randint(0, 256, (500, 96), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (60, 96), dtype=torch.int8)
    return x, weight, (x.double() - source.zero_point) @ weight.double().T, source


@pytest.mark.parametrize("seed", range(3))
def test_linear_layers(seed: int) -> None:
    x, weight, sums, source = linear_case(seed)
    (out,) = grids(seed + 50, 1)
    found, bias = layer(seed, weight, sums, source, out)
    assert found.bias is not None
    constants = {"w": weight.numpy(), "sw": found.scales.numpy(), "zw": np.zeros(len(weight), np.int8)}
    constants |= {**parameters(source, "x"), "b": found.bias.to(torch.int32).numpy()}
    written = run("QGemm", constants | parameters(out, "y"), {"x": x}, order="x sx zx w sw zw b sy zy", transB=1)
    assert torch.equal(written, whole(ORT.layers["linear"](found, None, None, out), out))
    real = run("QGemm", constants, {"x": x}, TensorProto.FLOAT, order="x sx zx w sw zw b _ _", transB=1)
    assert torch.equal(real, ORT.layers["linear"](found, None, None, None))
    written = IntegerLinear(weight, found.scales, bias, source, LinearEnd(out))(x)
    assert torch.equal(written, whole(EAGER.layers["linear"](found, None, None, out), out))
    real = IntegerLinear(weight, found.scales, bias, source, LinearEnd(None))(x)
    assert torch.equal(real, EAGER.layers["linear"](found, None, None, None))


def pairs() -> tuple[Tensor, Tensor]:
    """Return every pair of bytes."""
    values = torch.arange(256, dtype=torch.uint8)
    return values.repeat(256), values.repeat_interleave(256)


def next_to_ties(seed: int) -> list[ByteGrid]:
    """Return grids of two operands and a result in small whole ratios, to a few last bits."""
    random, (left, right, out) = np.random.default_rng(seed), grids(seed, 3)
    ratios = (1.0, float(random.integers(1, 4)), 2.0 * float(random.integers(1, 5)))
    jitter = 1 + random.integers(-3, 4, 3) * 3e-8
    scales = [float(np.float32(left.scale * ratio * more)) for ratio, more in zip(ratios, jitter, strict=True)]
    return [ByteGrid(s, g.zero_point, 0, 255) for s, g in zip(scales, (left, right, out), strict=True)]


def products_on_ties(seed: int) -> list[ByteGrid]:
    """Return grids of two operands, and one of a result on which many products lie halfway, with an odd zero-point."""
    left, right, out = grids(seed, 3)
    step = np.float32(left.scale) * np.float32(right.scale) * 2 * (1 + seed % 5)
    return [left, right, ByteGrid(float(step), out.zero_point | 1, 0, 255)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("of", [lambda seed: grids(seed, 3), next_to_ties, products_on_ties])
def test_sums_and_products_of_every_pair(of: Callable[[int], list[ByteGrid]], seed: int) -> None:
    a, b = pairs()
    left, right, out = of(seed)
    constants = parameters(left, "a") | parameters(right, "b") | parameters(out, "y")
    for op, kind in (("QLinearAdd", "add"), ("QLinearMul", "mul")):
        answer = run(op, constants, {"a": a, "b": b}, order="a sa za b sb zb sy zy")
        assert torch.equal(answer, whole(join(ORT, PAIR, left, right, out, kind=kind)(a, b), out)), op
    large = [t.view(2, 8, 64, 64).contiguous(memory_format=torch.channels_last) for t in (a, b)]
    # Small sums take another kernel than large ones.
    for one, other in ((a[:20_000], b[:20_000]), (large[0], large[1])):
        made = IntegerAdd(left, right, out)(one, other)
        assert torch.equal(made, whole(join(EAGER, PAIR, left, right, out, kind="add")(one, other), out))
        product = IntegerMul(left, right, out)(one, other)
        assert torch.equal(product, whole(join(EAGER, PAIR, left, right, out, kind="mul")(one, other), out))


@pytest.mark.parametrize("seed", range(4))
def test_quantizing_next_to_ties(seed: int) -> None:
    random, (grid,) = np.random.default_rng(seed), grids(seed, 1)
    steps = random.integers(-300, 300, 50_000) + random.integers(0, 2, 50_000) * 0.5
    x = torch.from_numpy((steps * grid.scale * (1 + random.integers(-2, 3, 50_000) * 6e-8)).astype(np.float32))
    answer = run("QuantizeLinear", parameters(grid, "x"), {"x": x}, order="x sx zx")
    assert torch.equal(answer, whole(ORT.quantize(x, grid), grid))
    assert torch.equal(Quantize(grid)(x), whole(EAGER.quantize(x, grid), grid))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("side", [7, 8])
def test_means_next_to_ties(seed: int, side: int) -> None:
    torch.manual_seed(seed)
    source, other = grids(seed, 2)
    x = torch.randint(0, 256, (1, 512, side, side), dtype=torch.uint8)
    step = np.float32(source.scale / side**2 * 32 * (1 + (seed - 2) * 6e-8))
    out = ByteGrid(float(step), other.zero_point, 0, 255)
    constants = parameters(source, "x") | parameters(out, "y")
    answer = run("QLinearGlobalAveragePool", constants, {"x": x}, order="x sx zx sy zy", channels_last=0)
    assert torch.equal(answer, whole(join(ORT, MEAN, source, out, kind="global_pool")(x), out))
    made = IntegerAveragePool(source, out, None)(x)
    assert torch.equal(made, whole(join(EAGER, MEAN, source, out, kind="global_pool")(x), out))


@pytest.mark.parametrize("size", [2, 3])
def test_averages_over_windows(size: int) -> None:
    torch.manual_seed(size)
    source, other = grids(size, 2)
    out = ByteGrid(float(np.float32(source.scale * (1 + 6e-8))), other.zero_point, 0, 255)
    x = torch.randint(0, 256, (1, 8, 30, 30), dtype=torch.uint8)
    constants = parameters(source, "x") | parameters(out, "y")
    sizes: dict[str, Any] = {"kernel_shape": [size, size], "strides": [size, size]}
    answer = run("QLinearAveragePool", constants, {"x": x}, order="x sx zx sy zy", **sizes)
    window = ([size, size], [size, size])
    pool = GRAPH.call_function(torch.ops.aten.avg_pool2d.default, (X, *window))
    assert torch.equal(answer, whole(join(ORT, pool, source, out, kind="avg_pool")(x), out))
    made = IntegerAveragePool(source, out, window)(x)
    assert torch.equal(made, whole(join(EAGER, pool, source, out, kind="avg_pool")(x), out))
