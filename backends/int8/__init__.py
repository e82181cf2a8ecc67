"""The PyTorch backend: an FX graph of integer kernels."""

from __future__ import annotations

from fxquant.backends.affine import ROUNDER, ByteGrid, dequantize_u8, quantize_u8
from fxquant.backends.int8.attention import fuse_attention
from fxquant.backends.int8.backend import NAME, FxInt8Backend, kernel_report, traced_forms
from fxquant.backends.int8.conv import IntegerConv, traced_form
from fxquant.backends.int8.custom_ops import conv2d_op
from fxquant.backends.int8.dynamic_linear import DynamicLinear, lower_dynamic
from fxquant.backends.int8.first_use import OnFirstUse
from fxquant.backends.int8.geometry import ConvGeometry, ConvGrids
from fxquant.backends.int8.inductor import compiled
from fxquant.backends.int8.kernels import EXACT_KERNEL, LinearEnd, conv_kernel_is_exact
from fxquant.backends.int8.linear import ACTIVATIONS, IntegerLinear
from fxquant.backends.int8.modules import (
    Dequantize,
    IntegerAdd,
    IntegerAveragePool,
    IntegerMaxPool,
    IntegerMul,
    IntegerPad,
    Quantize,
)
from fxquant.backends.int8.packed_layer import PackedLayer, packed_weight, unpacked_weight
from fxquant.backends.int8.rules import INTEGER_OPS, IntegerOp
from fxquant.backends.int8.scale_order import conv_joins_scales
from fxquant.backends.int8.tables import Lookup, look_up
