from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.backends.int8 import ByteGrid, ConvGeometry, ConvGrids, IntegerConv, conv_kernel_is_exact, traced_form

SOURCE, OUT, ADDEND = ByteGrid(0.02, 9, 0, 255), ByteGrid(0.9, 100, 0, 255), ByteGrid(0.5, 40, 0, 255)
ONE_PIXEL = ConvGeometry((1, 1), (0, 0), (1, 1), 1)


@pytest.fixture(autouse=True)
def _traced_anew() -> None:
    """Dynamo gives up on a function that it has traced eight times, and runs it as it is."""
    torch._dynamo.reset()


def _random(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def _conv(
    weight: Tensor, geometry: ConvGeometry, form: str, out: ByteGrid | None = OUT, addend: ByteGrid | None = None
) -> IntegerConv:
    scales, bias = torch.linspace(1e-3, 1e-2, len(weight)), torch.linspace(-3, 3, len(weight))
    return IntegerConv(weight, scales, bias, geometry, ConvGrids(SOURCE, out, addend), form=form)


@pytest.mark.parametrize(
    ("outputs", "groups", "kernel", "elements", "form"),
    [
        (8, 1, 1, 1000, "rows"),
        (8, 1, 1, 10_000_000, "call"),
        (8, 1, 3, 1000, "call"),
        (6, 6, 3, 1000, "shifted"),
        (6, 6, 3, 10_000_000, "call"),
        (12, 6, 3, 1000, "call"),
    ],
)
def test_form_is_chosen_by_shape_and_size(outputs: int, groups: int, kernel: int, elements: int, form: str) -> None:
    weight = torch.zeros(outputs, 6 // groups, kernel, kernel)
    assert traced_form(weight, ConvGeometry((1, 1), (0, 0), (1, 1), groups), elements) == form


def test_padding_needs_the_kernel() -> None:
    assert traced_form(torch.zeros(6, 1, 3, 3), ConvGeometry((1, 1), (1, 1), (1, 1), 6), 1000) == "call"
    assert traced_form(torch.zeros(8, 6, 1, 1), ConvGeometry((1, 1), (1, 0), (1, 1), 1), 1000) == "call"


@pytest.mark.parametrize("end", ["float", "integers", "narrow", "sum"])
@pytest.mark.parametrize(
    ("form", "weight", "geometry"),
    [
        ("rows", (5, 6, 1, 1), ONE_PIXEL),
        ("rows", (5, 6, 1, 1), ConvGeometry((2, 3), (0, 0), (1, 1), 1)),
        ("rows", (5, 1, 1, 1), ONE_PIXEL),
        ("shifted", (6, 1, 3, 3), ConvGeometry((1, 1), (1, 1), (1, 1), 6)),
        ("shifted", (6, 1, 3, 5), ConvGeometry((2, 1), (1, 0), (1, 1), 6)),
        ("shifted", (6, 1, 2, 3), ConvGeometry((1, 2), (2, 1), (2, 1), 6)),
    ],
)
def test_every_form_gives_the_kernels_answer(
    form: str, weight: tuple[int, ...], geometry: ConvGeometry, end: str
) -> None:
    out = {"float": None, "narrow": ByteGrid(0.8, 3, 3, 15)}.get(end, OUT)
    values = _random(*weight, low=-128, high=128).to(torch.int8)
    x = _random(2, weight[1] * geometry.groups, 9, 8).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    forms = {way: _conv(values, geometry, way, out, ADDEND if end == "sum" else None) for way in ("call", form)}
    shape = _conv(values, geometry, "call", None)(x).shape
    arguments = (x, _random(*shape, seed=5).to(torch.uint8)) if end == "sum" else (x,)
    expected = forms["call"](*arguments)
    assert len(expected.unique()) > 3
    for module in forms.values():
        traced = torch.compile(module, backend="eager", dynamic=False)
        made = traced(*arguments)
        assert made.shape == expected.shape
        assert made.dtype == expected.dtype
        if out is None:
            torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-4)
        else:
            difference = (made.int() - expected.int()).abs()
            # Float32 may decide a tie the other way, and nothing else.
            assert difference.max() <= 1
            assert (difference > 0).double().mean() <= 0.02


@pytest.mark.skipif(not conv_kernel_is_exact(), reason="needs oneDNN's integer convolution")
def test_the_second_operand_is_overwritten_only_where_that_is_allowed() -> None:
    module = _conv(_random(4, 3, 1, 1, low=-9, high=9).to(torch.int8), ONE_PIXEL, "call", OUT, ADDEND)
    x = _random(1, 3, 4, 4).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    other = _random(1, 4, 4, 4, seed=2).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    before = other.clone()
    kept = module(x, other)
    assert torch.equal(other, before)
    module.may_overwrite = True
    assert torch.equal(module(x, other), kept)
    assert not torch.equal(other, before)


def test_a_copy_prepares_itself_anew_and_new_weights_are_seen() -> None:
    module = _conv(_random(4, 3, 3, 3, low=-9, high=9).to(torch.int8), ConvGeometry((1, 1), (1, 1), (1, 1), 1), "call")
    x = _random(1, 3, 5, 5).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    first = module(x)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), first)
    negative = _conv(-module.weight, module.geometry, "call")
    twin.load_state_dict(negative.state_dict())
    assert torch.equal(twin.weight, -module.weight)
    assert torch.equal(twin(x), negative(x))
    assert not torch.equal(twin(x), first)
    assert torch.equal(module(x), first)


@pytest.mark.parametrize("out", [None, OUT, ByteGrid(0.8, 3, 3, 15)])
@pytest.mark.parametrize("summed", [False, True])
def test_weights_packed_beforehand_are_called_without_our_op(summed: bool, out: ByteGrid | None) -> None:
    if summed and out is None:
        pytest.skip("a sum is rounded")
    x = _random(1, 3, 6, 6).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    weight = _random(4, 3, 3, 3, low=-99, high=99).to(torch.int8)
    grids = ConvGrids(SOURCE, out, ADDEND if summed else None)
    geometry = ConvGeometry((1, 1), (1, 1), (1, 1), 1)
    module = IntegerConv(weight, torch.full((4,), 3e-3), None, geometry, grids, shape=x.shape)
    arguments = (x, _random(1, 4, 6, 6, seed=3).to(torch.uint8)) if summed else (x,)
    expected = module(*arguments)
    targets: list[str] = []

    def look(graph: GraphModule, _: list[Tensor]) -> GraphModule:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    made = torch.compile(module, backend=look, dynamic=False)(*arguments)
    assert made.dtype == expected.dtype
    assert (made.float() - expected.float()).abs().max() <= (0 if out is None else 1)
    assert targets
    assert not any("fxquant.conv2d_u8" in target for target in targets)
    exported = torch.export.export(module, arguments)
    assert any("fxquant.conv2d_u8" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(*arguments), expected)
    assert torch.equal(copy.deepcopy(module)(*arguments), expected)
