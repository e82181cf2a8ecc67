from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from fxquant.backends import to_qdq
from fxquant.backends.onnx import (
    LARGEST_FILE,
    Axis,
    OnnxOptions,
    block_weight,
    executable,
    fold_stems,
    fuse_integers,
    kernel_report,
    padded_conv,
    space_to_depth,
    to_onnx,
)
from fxquant.capture import capture
from fxquant.core.errors import LoweringError, OptionError
from fxquant.passes import Canonicalize
from tests.backends.lowered import calibrated, plan_of
from tests.models import Composed

GEOMETRIES = [(k, b, e, s) for k, b, e, s in itertools.product(range(1, 8), range(4), range(4), (8, 9, 14, 15))]


@pytest.mark.parametrize("odd", [0, 1])
def test_products_over_blocks_are_the_products_over_pixels(odd: int) -> None:
    torch.manual_seed(0)
    seen = 0
    for kernel, before, behind, size in GEOMETRIES[odd::2]:
        rows, columns = Axis(size, kernel, before, behind), Axis(12, 3, 1, 1)
        if rows.tail < 0:
            continue
        seen += 1
        x = torch.randint(-9, 9, (2, 3, size, 12)).double()
        weight = torch.randint(-9, 9, (4, 3, kernel, 3)).double()
        expected = padded_conv(x, weight, None, [2, 2], [before, 1, behind, 1], [1, 1], 1)
        blocks = space_to_depth(nn.functional.pad(x, [0, columns.missing, 0, rows.missing]))
        pads = [rows.lead, columns.lead, rows.tail, columns.tail]
        found = padded_conv(blocks, block_weight(weight, rows, columns), None, [1, 1], pads, [1, 1], 1)
        assert torch.equal(found, expected), (kernel, before, behind, size)
    assert seen > 150


def test_channels_are_counted_as_in_onnx() -> None:
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    node = onnx.helper.make_node("SpaceToDepth", ["x"], ["y"], blocksize=2)
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, x.shape)],
        [onnx.helper.make_tensor_value_info("y", kind, (2, 12, 2, 3))],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    assert torch.equal(executable(model.SerializeToString())((x,)), space_to_depth(x))


def test_a_kernel_larger_than_its_image_is_refused() -> None:
    with pytest.raises(LoweringError, match="kernel of 7"):
        Axis(4, 7, 1, 1)


def quantized(conv: nn.Conv2d, size: int, more: tuple[nn.Module, ...] = (), width: int = 8) -> GraphModule:
    torch.manual_seed(0)
    images = torch.randn(8, conv.in_channels, size, size)
    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(conv.out_channels, 4, 1), *more)
    return plan_of(calibrated(Canonicalize()(capture(model, (images[:2],))), (images,)), (width,))


torch.manual_seed(0)
STEMS = {
    "3x3": (nn.Conv2d(3, 8, 3, stride=2, padding=1), 16),
    "3x3 of an odd image": (nn.Conv2d(3, 8, 3, stride=2), 15),
    "3x3 that leaves a row over": (nn.Conv2d(3, 8, 3, stride=2), 16),
    "7x7": (nn.Conv2d(3, 8, 7, stride=2, padding=3), 32),
    "2x2 of one channel": (nn.Conv2d(1, 8, 2, stride=2), 16),
    "oblong": (nn.Conv2d(2, 8, (5, 2), stride=2, padding=(2, 0)), 16),
}
LEFT = {
    "stride 1": nn.Conv2d(3, 8, 3, padding=1),
    "stride 4": nn.Conv2d(3, 8, 4, stride=4),
    "dilated": nn.Conv2d(3, 8, 3, stride=2, dilation=2),
    "grouped": nn.Conv2d(2, 8, 3, stride=2, groups=2),
    "four channels": nn.Conv2d(4, 8, 3, stride=2),
}


@pytest.mark.parametrize("name", sorted(STEMS))
@pytest.mark.parametrize("width", [4, 8])
def test_a_stem_over_blocks_gives_the_same_bits_on_integers(name: str, width: int) -> None:
    conv, size = STEMS[name]
    module = quantized(conv, size, width=width)
    model = to_onnx(module)
    onnx.checker.check_model(model, full_check=True)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("SpaceToDepth") == 1
    report = kernel_report(model.SerializeToString())
    assert report.kernels == {"0": "QLinearConv", "2": "QLinearConv"}
    images = torch.randn(5, conv.in_channels, size, size)
    plain, folded = (fuse_integers(to_qdq(module)) for _ in range(2))
    fold_stems(folded)
    # Sums of another order may round to the other side of a tie: one step of the result, and seldom.
    apart = (folded(images) - plain(images)).abs() > 1e-6
    assert float(apart.double().mean()) < 0.001
    run = executable(model.SerializeToString())
    assert float((run((images,)) - plain(images)).abs().max()) <= 0.05


@pytest.mark.parametrize("name", sorted(LEFT))
def test_other_convolutions_stay_as_they_are(name: str) -> None:
    model = to_onnx(quantized(LEFT[name], 16))
    assert "SpaceToDepth" not in {node.op_type for node in model.graph.node}


def test_a_quantizer_that_others_read_stays_where_it_is() -> None:
    a, b = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(3, 4, 3, stride=2)
    model = Composed(lambda m, x: torch.relu(m.a(x)) + torch.relu(m.b(x)), a=a, b=b)
    images = torch.randn(8, 3, 16, 16)
    module = plan_of(calibrated(Canonicalize()(capture(model, (images[:2],))), (images,)), (8,))
    model = to_onnx(module)
    assert "SpaceToDepth" not in {node.op_type for node in model.graph.node}


def test_weights_of_the_given_graph_stay_untouched() -> None:
    module = quantized(STEMS["3x3"][0], 16)
    images = torch.randn(2, 3, 16, 16)
    before = module(images)
    first, second = to_onnx(module).SerializeToString(), to_onnx(module).SerializeToString()
    assert first == second
    assert np.array_equal(before.detach().numpy(), module(images).detach().numpy())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"runtime": "tensorrt"}, "onnxruntime, openvino"),
        ({"weight_only": (1,)}, "a list of texts"),
        ({"block_size": 48}, "32"),
        ({"largest_file": 0}, "of at least 1 and at most"),
        ({"largest_file": LARGEST_FILE + 1}, "of at least 1 and at most"),
    ],
)
def test_values_that_are_not_allowed_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        OnnxOptions(**given)


@pytest.mark.parametrize(("runtime", "blocks"), [("onnxruntime", True), ("openvino", False)])
def test_only_onnx_runtime_gets_stems_over_blocks(runtime: str, blocks: bool) -> None:
    model = to_onnx(quantized(*STEMS["3x3"]), options=OnnxOptions.of({"runtime": runtime}))
    assert ("SpaceToDepth" in {node.op_type for node in model.graph.node}) == blocks
