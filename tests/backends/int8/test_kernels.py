from __future__ import annotations

import gc
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.backends.int8 import (
    ROUNDER,
    ByteGrid,
    ConvGeometry,
    ConvGrids,
    IntegerAdd,
    IntegerAveragePool,
    IntegerMaxPool,
    IntegerMul,
    LinearEnd,
    conv2d_op,
    dequantize_u8,
    kernels,
    packed_weight,
    quantize_u8,
)
from fxquant.core.errors import LoweringError
from fxquant.core.ir import FakeQuantize, Grid, QuantSpec, activation_spec

FULL = ByteGrid(0.02, 77, 0, 255)


def _uint8(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def _int8(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _on(grid: ByteGrid, real: Tensor) -> Tensor:
    """The definition, in float64."""
    return (torch.round(real / grid.scale) + grid.zero_point).clamp(grid.low, grid.high)


@st.composite
def _convolutions(draw: st.DrawFn) -> tuple[Tensor, Tensor, ConvGeometry]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))
    if draw(st.booleans()):
        groups = inputs
        outputs = groups * draw(st.integers(1, 2))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = draw(pair), draw(pair), draw(pair)
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    # Just large enough for one pixel of output, then odd amounts more.
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [least[i] + draw(st.integers(0, 6)) for i in range(2)]
    seed = draw(st.integers(0, 1000))
    x = _uint8(draw(st.integers(1, 2)), inputs, *size, seed=seed)
    weight = _int8(outputs, inputs // groups, *kernel, seed=seed + 1)
    return x, weight, ConvGeometry(stride, padding, dilation, groups)


@settings(max_examples=60, deadline=None)
@given(case=_convolutions(), zero_point=st.integers(0, 255), biased=st.booleans(), high=st.sampled_from([255, 15, 3]))
def test_conv_is_the_integer_formula_for_any_shape(
    case: tuple[Tensor, Tensor, ConvGeometry], zero_point: int, biased: bool, high: int
) -> None:
    x, weight, geometry = case
    scales = torch.rand(len(weight), generator=torch.Generator().manual_seed(3)) * 0.01 + 0.001
    bias = torch.linspace(-2, 2, len(weight)) if biased else None
    grid = ByteGrid(0.02, zero_point, 0, 255)
    # Zeros around (x - z) are zero-points around x: the border is where a kernel could differ.
    sums = F.conv2d(
        x.double() - zero_point,
        weight.double(),
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
    )
    real = sums * 0.02 * scales.double().view(-1, 1, 1) + (0 if bias is None else bias.double().view(-1, 1, 1))
    out = ByteGrid(max(float(real.abs().max()) / high, 1e-6), high // 2, 0, high)
    for exact in (False, True):
        made = kernels.conv2d(x, weight, scales, bias, geometry, ConvGrids(grid, None), None, exact)
        assert made.dtype == torch.float32
        torch.testing.assert_close(made.double(), real, rtol=1e-5, atol=float(real.abs().max()) * 1e-6 + 1e-9)
        integers = kernels.conv2d(x, weight, scales, bias, geometry, ConvGrids(grid, out), None, exact)
        _assert_rounded(integers, real, out)
    by_op = conv2d_op(x, *packed_weight(weight), scales, bias, geometry, ConvGrids(grid, out))
    assert torch.equal(by_op, kernels.conv2d(x, weight, scales, bias, geometry, ConvGrids(grid, out)))


def _assert_rounded(integers: Tensor, real: Tensor, out: ByteGrid) -> None:
    """Float32 may decide a tie the other way, and nothing else."""
    assert integers.dtype == torch.uint8
    difference = (integers.double() - _on(out, real)).abs()
    assert difference.max() <= 1
    to_tie = ((real / out.scale).remainder(1.0) - 0.5).abs()
    assert (to_tie[difference > 0] < 1e-3).all()


@settings(max_examples=60, deadline=None)
@given(
    case=_convolutions(),
    zero_point=st.integers(0, 255),
    out=st.sampled_from(
        [ByteGrid(4.0, 100, 0, 255), ByteGrid(4.0, 100, 100, 255), ByteGrid(9.0, 9, 0, 63), ByteGrid(5.0, 3, 3, 15)]
    ),
)
def test_a_second_operand_is_added_before_the_only_rounding(
    case: tuple[Tensor, Tensor, ConvGeometry], zero_point: int, out: ByteGrid
) -> None:
    x, weight, geometry = case
    scales = torch.rand(len(weight), generator=torch.Generator().manual_seed(3)) * 0.01 + 0.001
    grids = ConvGrids(ByteGrid(0.02, zero_point, 0, 255), None)
    plain = kernels.conv2d(x, weight, scales, None, geometry, grids)
    addend = ByteGrid(0.7, 31, 0, 255)
    other = _channels_last(_uint8(*plain.shape, seed=9))
    before = other.clone()
    real = plain.double() + (other.double() - 31) * 0.7
    for exact in (False, True):
        both = ConvGrids(grids.source, out, addend)
        made = kernels.conv2d(x, weight, scales, None, geometry, both, other, exact)
        _assert_rounded(made, real, out)
        assert torch.equal(other, before), "the operand is not ours to change"
        assert torch.equal(conv2d_op(x, *packed_weight(weight), scales, None, geometry, both, other, exact), made)


def test_an_addend_needs_a_grid_to_round_to() -> None:
    with pytest.raises(LoweringError, match="give it an output grid"):
        ConvGrids(FULL, None, FULL)


def test_no_kernel_ends_in_any_activation() -> None:
    with pytest.raises(LoweringError, match=r"mish.*gelu_tanh"):
        LinearEnd(None, "mish")


def test_the_op_tells_compilers_the_truth_about_shape_and_strides() -> None:
    x, weight = _uint8(2, 6, 9, 7), packed_weight(_int8(4, 3, 3, 2))
    for scale, addend in ((0.5, None), (0.0, None), (0.5, _channels_last(_uint8(2, 4, 5, 5)))):
        steps, points = [0.02, scale, 0.1 if addend is not None else 0.0], [7, 3, 0, 15, 9]
        arguments = (x, addend, *weight, torch.rand(4), None, steps, points, [2, 1, 1, 0, 1, 2, 2], False)
        torch.library.opcheck(
            torch.ops.fxquant.conv2d_u8.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("zero_point", [0, 6, 7])
def test_quantize_rounds_half_to_even_as_the_simulation_does(zero_point: int) -> None:
    spec = activation_spec(4)
    scale, zero = torch.tensor(0.25), torch.tensor(zero_point)
    x = torch.cat([torch.arange(-40, 41) * 0.125, torch.randn(500) * 3, torch.tensor([1e9, -1e9, 0.0])])
    grid = ByteGrid.of(Grid(spec, scale, zero))
    expected = FakeQuantize(Grid(spec, scale, zero))(x)
    q = quantize_u8(x, grid)
    assert q.dtype == torch.uint8
    assert torch.equal(dequantize_u8(q, grid), expected)


def test_signed_grid_is_shifted_into_uint8() -> None:
    spec = QuantSpec(bits=6, signed=True, symmetric=False)
    scale, zero = torch.tensor(0.1), torch.tensor(-5)
    x = torch.randn(300) * 3
    grid = ByteGrid.of(Grid(spec, scale, zero))
    assert (grid.zero_point, grid.low, grid.high) == (27, 0, 63)
    torch.testing.assert_close(dequantize_u8(quantize_u8(x, grid), grid), FakeQuantize(Grid(spec, scale, zero))(x))


@given(scale=st.floats(0.01, 1.0), zero_point=st.integers(0, 255), low=st.floats(-20, 5), span=st.floats(0.1, 20))
def test_a_clip_is_a_shorter_grid(scale: float, zero_point: int, low: float, span: float) -> None:
    grid = ByteGrid(scale, zero_point, 0, 255)
    x = torch.linspace(-30, 30, 301)
    clipped = quantize_u8(x.clamp(low, low + span), grid)
    absorbed = quantize_u8(x, grid.clipped(low, low + span))
    # Off by a step only where float32 and float64 disagree about a tie.
    assert (clipped.int() - absorbed.int()).abs().max() <= 1
    assert absorbed.min() >= clipped.min().int() - 1
    assert absorbed.max() <= clipped.max().int() + 1


def test_relu_in_front_of_a_grid_with_negative_values_starts_at_the_zero_point() -> None:
    assert ByteGrid(0.1, 50, 0, 255).clipped(0.0, torch.inf) == ByteGrid(0.1, 50, 50, 255)
    assert ByteGrid(0.1, 0, 0, 255).clipped(0.0, 6.0) == ByteGrid(0.1, 0, 0, 60)
    assert ByteGrid(0.01, 0, 0, 255).clipped(0.0, 6.0) == ByteGrid(0.01, 0, 0, 255)


@pytest.mark.parametrize("values", [(0.0, 0, 0, 255), (float("nan"), 0, 0, 255), (0.1, 256, 0, 255), (0.1, 3, 9, 8)])
def test_grid_that_does_not_fit_uint8_is_refused(values: tuple[float, int, int, int]) -> None:
    with pytest.raises(LoweringError):
        ByteGrid(*values)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 2, 63, 64])
def test_matmul_is_exact_whatever_the_strides(rows: int, depth: int) -> None:
    weight = _int8(7, depth)
    memory = _uint8(rows * (depth + 3), depth + 3)
    views = {
        "plain": memory[:rows, :depth].contiguous(),
        "transposed": memory[:depth, :rows].t(),
        "gaps": memory[:rows, :depth],
        "repeated": memory[:1, :depth].expand(rows, depth),
        "row of stride 0": memory.reshape(-1)[:depth].as_strided((1, depth), (0, 1)),
    }
    for name, x in views.items():
        expected = x.double() @ weight.double().t()
        assert torch.equal(kernels.matmul(x, weight).double(), expected), name
        assert torch.equal(kernels.matmul(x, weight, exact=True).double(), expected), name


def test_matmul_does_not_saturate() -> None:
    x, weight = torch.full((4, 512), 255, dtype=torch.uint8), torch.full((3, 512), -128, dtype=torch.int8)
    assert bool((kernels.matmul(x, weight).double() == -255 * 128 * 512).all())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (1, 32, 40, 40)])
def test_add_on_three_grids(shape: tuple[int, ...], exact: bool) -> None:
    a, b = _channels_last(_uint8(*shape)), _channels_last(_uint8(*shape, seed=5))
    left, right, out = FULL, ByteGrid(0.031, 12, 0, 255), ByteGrid(0.04, 101, 0, 200)
    before = (a.clone(), b.clone())
    made = IntegerAdd(left, right, out, exact)(a, b)
    expected = _on(out, (a.double() - 77) * left.scale + (b.double() - 12) * right.scale)
    assert (made.double() - expected).abs().max() <= 1
    assert (made.double() != expected).double().mean() < 0.01
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_mul_and_mean_on_other_grids() -> None:
    a, b = _uint8(2, 4, 6, 6), _uint8(2, 4, 1, 1, seed=9)
    out = ByteGrid(0.01, 128, 0, 255)
    product = (a.double() - 77) * (b.double() - 5) * FULL.scale * 0.003
    assert (IntegerMul(FULL, ByteGrid(0.003, 5, 0, 255), out)(a, b).double() - _on(out, product)).abs().max() <= 1
    real = (a.double() - 77) * FULL.scale
    for window, expected in {
        None: real.mean((2, 3), keepdim=True),
        ((3, 2), (1, 2), (1, 0)): F.avg_pool2d(real, (3, 2), (1, 2), (1, 0)),
    }.items():
        assert (IntegerAveragePool(FULL, out, window)(a).double() - _on(out, expected)).abs().max() <= 1


@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.booleans(),
)
def test_max_pool_on_integers(kernel: tuple[int, int], stride: tuple[int, int], pads: bool) -> None:
    x = _channels_last(_uint8(2, 3, 9, 7))
    padding = (kernel[0] // 2, kernel[1] // 2) if pads else (0, 0)
    made = IntegerMaxPool(kernel, stride, padding)(x)
    assert made.dtype == torch.uint8
    assert torch.equal(made.float(), F.max_pool2d(x.float(), kernel, stride, padding))


def test_packed_weight_goes_when_its_weight_goes() -> None:
    gc.collect()
    before = len(kernels._PACKED)
    weight = _int8(4, 3, 3, 3)
    geometry = ConvGeometry((1, 1), (1, 1), (1, 1), 1)
    kernels.conv2d(_uint8(1, 3, 5, 5), weight, torch.ones(4), None, geometry, ConvGrids(FULL, None))
    assert len(kernels._PACKED) == before + kernels.conv_kernel_is_exact()
    del weight
    gc.collect()
    assert len(kernels._PACKED) == before


def test_the_rounder_is_exact_over_the_range_it_serves() -> None:
    # Whole numbers of this size have a spacing of 1, so the sum rounds to them; Python's fractions say so.
    values = [Fraction(k, 4) for k in range(-1040, 1041)]
    moved = torch.tensor([float(v) for v in values]) + ROUNDER - ROUNDER
    assert [int(m) for m in moved] == [round(v) for v in values]


@pytest.mark.parametrize(
    ("size", "kernel", "padding", "dilation", "stride", "reads"),
    [
        (5, 1, 1, 3, 1, False),
        (5, 2, 2, 2, 1, True),
        (5, 2, 3, 2, 1, False),
        (1, 2, 1, 2, 1, False),
        (2, 2, 1, 2, 1, True),
        (5, 3, 0, 2, 2, False),
        (7, 3, 0, 2, 2, True),
        (3, 3, 1, 1, 2, True),
    ],
)
def test_images_that_onednn_misreads_are_recognised(
    size: int, kernel: int, padding: int, dilation: int, stride: int, reads: bool
) -> None:
    """oneDNN crashes on some of these now and then, so the recognition is tested, not the crash."""
    geometry = ConvGeometry((1, stride), (0, padding), (1, dilation), 1)
    assert geometry.reads(_int8(2, 2, 3, kernel), (1, 2, 9, size)) is reads
    # Rows may be left alone by a stride.
    turned = ConvGeometry((stride, 1), (padding, 0), (dilation, 1), 1)
    assert turned.reads(_int8(2, 2, kernel, 3), (1, 2, size, 9)) is (reads or stride > 1)


@pytest.mark.parametrize(
    ("image", "weight", "geometry"),
    [
        ((5, 3, 5), (2, 5, 1, 3), ConvGeometry((1, 2), (1, 0), (1, 2), 1)),
        ((2, 3, 3), (6, 1, 3, 3), ConvGeometry((1, 2), (2, 0), (2, 1), 2)),
        ((1, 3, 1), (2, 1, 2, 2), ConvGeometry((1, 1), (1, 1), (1, 2), 1)),
        ((5, 1, 5), (3, 5, 3, 2), ConvGeometry((2, 1), (3, 0), (2, 1), 1)),
    ],
)
def test_images_that_onednn_misreads_are_computed_right(
    image: tuple[int, ...], weight: tuple[int, ...], geometry: ConvGeometry
) -> None:
    x, w, scales = _uint8(2, *image), _int8(*weight), torch.ones(weight[0])
    assert not geometry.reads(w, x.shape)
    grids = ConvGrids(ByteGrid(1.0, 9, 0, 255), None)
    expected = F.conv2d(x.double() - 9, w.double(), None, *geometry.sizes, geometry.groups)
    assert torch.equal(kernels.conv2d(x, w, scales, None, geometry, grids).double(), expected)
    # A call that was prepared for a larger image takes this one too.
    larger = torch.Size((2, image[0], 20, 20))
    assert torch.equal(kernels.prepared_conv(w, scales, None, geometry, grids, larger)(x, None).double(), expected)


@pytest.mark.parametrize("pads", [(1, 0, 2, 3), (0, 0, 0, 0), (0, 4, 0, 1)])
def test_pad_is_the_constant_around_the_image(pads: tuple[int, int, int, int]) -> None:
    for x in (_uint8(2, 3, 4, 5), _channels_last(_uint8(2, 3, 4, 5)), _uint8(1, 1, 1, 1)):
        expected = F.pad(x, pads, value=7)
        made = kernels.pad_u8(x, pads, 7)
        assert torch.equal(made, expected)
        assert made.is_contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(
        torch.ops.fxquant.pad_u8.default, (x, list(pads), 7), test_utils=("test_schema", "test_faketensor")
    )
