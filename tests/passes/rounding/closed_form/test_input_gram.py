"""Streamed moments against patches written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, Node

from fxquant.core.errors import PipelineError
from fxquant.passes.formats import rows_of, squared_error
from fxquant.passes.rounding.closed_form import (
    GramAccumulator,
    channel_axis,
    geometry_of,
    output_moments,
    patches,
    rows_apart,
)
from tests.passes.rounding.tasks import op_node

aten = torch.ops.aten


def explicit(node: Node, x: Tensor, weight: Tensor) -> Tensor:
    """Return every patch, (groups, positions, K): what the op itself gives for filters that pick one element each."""
    groups = node.args[6] if len(node.args) > 6 else 1
    assert isinstance(groups, int)
    size = weight[0].numel()
    picking = torch.eye(size, dtype=x.dtype).reshape(size, *weight.shape[1:]).repeat(groups, *[1] * (weight.dim() - 1))
    assert callable(node.target)
    y: Tensor = node.target(x, picking, *node.args[2:])
    rows = y.movedim(1, -1) if weight.dim() > 2 else y
    return rows.reshape(-1, groups, size).transpose(0, 1)


def counted(node: Node, *batches: Tensor) -> Tensor:
    gram = GramAccumulator()
    for batch in batches:
        gram.add(batch, geometry_of(node))
    return gram.moments().gram


@settings(max_examples=60, deadline=None)
@given(
    axes=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.one_of(st.integers(0, 2), st.sampled_from(["same", "valid"])),
    groups=st.sampled_from([1, 2, 4]),
    height=st.integers(5, 8),
    seed=st.integers(0, 1000),
)
def test_gram_is_the_sum_over_explicit_patches(
    axes: int, kernel: int, stride: int, dilation: int, padding: int | str, groups: int, height: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, *[height, 5][:axes], generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 4 // groups, *[kernel, 2][:axes], generator=generator, dtype=torch.float64)
    words = isinstance(padding, str)
    op = {
        (1, False): aten.conv1d.default,
        (1, True): aten.conv1d.padding,
        (2, False): aten.conv2d.default,
        (2, True): aten.conv2d.padding,
    }[axes, words]
    step = 1 if padding == "same" else stride
    pads = padding if words else [padding] * axes
    node = op_node(op, x, weight, None, [step] * axes, pads, [dilation] * axes, groups)
    rows = explicit(node, x, weight)
    wanted = rows.transpose(1, 2) @ rows
    assert torch.allclose(counted(node, x[:2], x[2:]), wanted, rtol=1e-12, atol=1e-12)
    # Piece by piece, down to one row of positions at a time.
    assert torch.equal(torch.cat(list(patches(x, geometry_of(node), 1)), dim=1), rows)


@pytest.mark.parametrize(
    ("size", "channels", "taps", "stride", "apart"),
    [(32, 1, 3, 1, 4), (32, 4, 3, 1, 4), (32, 4, 3, 2, 1), (64, 12, 3, 1, 8), (64, 12, 3, 2, 2), (7, 1, 1, 1, 1)],
)
def test_of_many_positions_rows_apart_are_counted(size: int, channels: int, taps: int, stride: int, apart: int) -> None:
    """Of 32 x 32 positions and 36 weights, one row in 7 would do, and 8 rows are the least: one in 4."""
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.ones(3, channels, taps, taps, dtype=torch.float64)
    node = op_node(aten.conv2d.default, x, weight, None, [stride] * 2, [taps // 2] * 2)
    assert rows_apart(x, geometry_of(node)) == apart
    every = explicit(node, x, weight)[0].reshape(2, -(-size // stride), -(-size // stride), -1)
    seen = every[:, apart // 2 :: apart].flatten(0, 2)
    assert torch.allclose(counted(node, x)[0], seen.T @ seen, rtol=1e-12, atol=1e-12)
    y = torch.randn(2, 3, *every.shape[1:3], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = y[:, :, apart // 2 :: apart].movedim(1, -1).flatten(0, 2)
    found = output_moments(node, [x], [y])
    centred = seen - seen.mean(dim=0), rows - rows.mean(dim=0)
    assert torch.allclose(found.gram[0], centred[0].T @ centred[0], rtol=1e-9, atol=1e-9)
    assert torch.allclose(found.cross[0], centred[0].T @ centred[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_linear_layers_over_any_leading_axes(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    node = op_node(aten.linear.default, x, torch.zeros(3, 5, dtype=torch.float64))
    rows = x.reshape(-1, 5)
    assert torch.allclose(counted(node, x)[0], rows.T @ rows, rtol=1e-12)
    assert sum(piece.shape[1] for piece in patches(x, geometry_of(node), 6)) == len(rows)


def test_an_image_without_a_batch_axis() -> None:
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.zeros(2, 4, 3, 3, dtype=torch.float64)
    one = op_node(aten.conv2d.default, x, weight)
    many = op_node(aten.conv2d.default, x.unsqueeze(0), weight)
    assert torch.equal(counted(one, x), counted(many, x.unsqueeze(0)))
    assert (channel_axis(3, one), channel_axis(4, many)) == (0, 1)


def test_defaults_of_the_schema_are_read() -> None:
    x, weight = torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3)
    found = geometry_of(op_node(aten.conv2d.default, x, weight))
    assert (found.stride, found.padding, found.dilation, found.groups) == ((1, 1), ((0, 0), (0, 0)), (1, 1), 1)


def test_float32_values_lose_nothing_over_many_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4096, 3, generator=generator) + 10
    node = op_node(aten.linear.default, x, torch.zeros(2, 3))
    many = counted(node, *torch.split(x, 1))
    rows = x.double()
    assert torch.allclose(many[0], rows.T @ rows, rtol=1e-7)
    assert many.dtype == torch.float64


def test_cross_moments_pair_quantized_with_float_patches() -> None:
    generator = torch.Generator().manual_seed(0)
    x, f = (torch.randn(2, 4, 6, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.zeros(6, 2, 3, 3, dtype=torch.float64)
    node = op_node(aten.conv2d.default, x, weight, None, [2, 2], [1, 1], [1, 1], 2)
    gram = GramAccumulator(crossed=True)
    gram.add(x, geometry_of(node), f)
    moments = gram.moments()
    ours, floats = (explicit(node, value, weight) for value in (x, f))
    assert torch.allclose(moments.cross, ours.transpose(1, 2) @ floats, rtol=1e-12, atol=1e-12)
    assert torch.allclose(moments.gram, ours.transpose(1, 2) @ ours, rtol=1e-12, atol=1e-12)


def test_squared_error_is_the_outputs_error() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 6, 6, generator=generator, dtype=torch.float64)
    one, other = (torch.randn(6, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    node = op_node(aten.conv2d.default, x, one, None, [1, 1], [1, 1], [1, 1], 2)
    error = squared_error(rows_of(one - other, groups=2), counted(node, x))
    y = torch.nn.functional.conv2d(x, one - other, padding=1, groups=2)
    assert torch.allclose(error.flatten(), y.square().sum(dim=(0, 2, 3)), rtol=1e-10)


def test_what_cannot_be_counted_is_refused() -> None:
    x = torch.zeros(2, 3)
    node = op_node(aten.linear.default, x, torch.zeros(2, 3))
    with pytest.raises(PipelineError, match="no batch was counted"):
        GramAccumulator().moments()
    with pytest.raises(PipelineError, match="cross moments need"):
        GramAccumulator(crossed=True).add(x, geometry_of(node))
    with pytest.raises(PipelineError, match="cross moments need"):
        GramAccumulator(crossed=True).add(x, geometry_of(node), x[:1])
    with pytest.raises(PipelineError, match="has no weight"):
        geometry_of(Graph().placeholder("x"))
