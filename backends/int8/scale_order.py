"""In which order oneDNN's convolution multiplies the scales of its sums, found by trying."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fxquant.backends.affine import UINT8_MAX, ByteGrid
from fxquant.backends.int8.geometry import ConvGeometry, ConvGrids
from fxquant.backends.int8.kernels import prepared_conv


@cache
def conv_joins_scales(shape: tuple[int, ...], weight_shape: tuple[int, ...], geometry: ConvGeometry) -> bool:
    """Whether oneDNN computes `sums * (x_scale * scales)` for these shapes, and not `sums * x_scale * scales`.

    The two differ in the last bit of float32. Kernels for AMX and AVX2 join the scales, those for AVX512 do not, and
    which of them oneDNN takes depends on shapes in ways that it does not document: so both are tried on random values.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, UINT8_MAX + 1, shape, dtype=torch.uint8, generator=draw)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-127, 128, weight_shape, dtype=torch.int8, generator=draw)
    scales = torch.rand(weight_shape[0], generator=draw) + 0.5
    step = 0.1234567

    def real(x_scale: float, factors: Tensor) -> Tensor:
        grids = ConvGrids(ByteGrid(x_scale, 3, 0, UINT8_MAX), None)
        # A new weight for each call: packed weights are kept by weight, and scales may be packed along.
        return prepared_conv(weight.clone(), factors, None, geometry, grids, shape)(x, None)

    # With scales of 1 the answer is the integer sums, exact below 2^24.
    sums, found, channels = real(1.0, torch.ones_like(scales)), real(step, scales), scales.view(-1, 1, 1)
    in_turn, joined = sums * step * channels, sums * (step * channels)
    return int((found != joined).sum()) < int((found != in_turn).sum())
