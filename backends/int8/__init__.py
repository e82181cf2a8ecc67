"""The PyTorch backend: an FX graph of integer kernels."""

from __future__ import annotations

from fxquant.backends.affine import ROUNDER, UINT8_MAX, ByteGrid, dequantize_u8, quantize_u8
from fxquant.backends.int8.attention import fuse_attention
from fxquant.backends.int8.backend import NAME, FxInt8Backend, kernel_report, traced_forms
from fxquant.backends.int8.conv import IntegerConv, traced_form
from fxquant.backends.int8.custom_ops import conv2d_op
from fxquant.backends.int8.dynamic_linear import DynamicLinear, lower_dynamic
from fxquant.backends.int8.first_use import OnFirstUse
from fxquant.backends.int8.geometry import ConvGeometry, ConvGrids
from fxquant.backends.int8.inductor import compiled
from fxquant.backends.int8.kernels import EXACT_KERNEL, ONE_PASS_FROM, LinearEnd, conv_kernel_is_exact
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
from fxquant.backends.int8.rules import INTEGER_OPS, Ending, IntegerOp, OpCall
from fxquant.backends.int8.scale_order import conv_joins_scales

__all__ = [
    "ACTIVATIONS",
    "EXACT_KERNEL",
    "INTEGER_OPS",
    "NAME",
    "ONE_PASS_FROM",
    "ROUNDER",
    "UINT8_MAX",
    "ByteGrid",
    "ConvGeometry",
    "ConvGrids",
    "Dequantize",
    "DynamicLinear",
    "Ending",
    "FxInt8Backend",
    "IntegerAdd",
    "IntegerAveragePool",
    "IntegerConv",
    "IntegerLinear",
    "IntegerMaxPool",
    "IntegerMul",
    "IntegerOp",
    "IntegerPad",
    "LinearEnd",
    "OnFirstUse",
    "OpCall",
    "Quantize",
    "compiled",
    "conv2d_op",
    "conv_joins_scales",
    "conv_kernel_is_exact",
    "dequantize_u8",
    "fuse_attention",
    "kernel_report",
    "lower_dynamic",
    "quantize_u8",
    "traced_form",
    "traced_forms",
]
