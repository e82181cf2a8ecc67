"""The integer linear layer of a lowered graph, with the activation behind it where a kernel computes both."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.backends.affine import ByteGrid, quantize_u8, round_to_u8
from fxquant.backends.int8 import kernels
from fxquant.backends.int8.custom_ops import matmul_op
from fxquant.backends.int8.first_use import OnFirstUse
from fxquant.backends.int8.kernels import LinearEnd
from fxquant.backends.int8.packed_layer import PackedLayer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""Activation of a `LinearEnd` -> the function it is."""


class IntegerLinear(PackedLayer):
    """A linear layer: uint8 in, uint8 or float32 out.

    Args:
        weight: int8 `(N, K)`.
        scales: float32 `(N,)`.
        bias: float32 `(N,)` or None.
        grid: of the input.
        end: output grid and activation.
        packed: use oneDNN's packed product (faster for large ones) instead of `torch._int_mm`.
        exact: take the float64 route whatever the CPU can do.
    """

    scales: Tensor
    bias: Tensor | None
    factors: Tensor
    offsets: Tensor

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        grid: ByteGrid,
        end: LinearEnd,
        packed: bool = False,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.end = grid, end
        self.exact = exact or not kernels.matmul_kernel_is_exact()
        self.in_one_call = packed and not self.exact and kernels.conv_kernel_is_exact()
        self.keep(weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.prepare()
        self._call = OnFirstUse[Callable[[Tensor], Tensor]]()

    def prepare(self) -> None:
        """Keep `y / unit = sums * factors + offsets`: the zero-point's share of every sum is known beforehand."""
        out = self.end.out
        # In units of the output grid where nothing but the rounding follows, in real units otherwise.
        unit = out.scale if out is not None and self.end.activation == "none" else 1.0
        step = self.grid.scale * self.scales.double() / unit
        shift = -self.grid.zero_point * self.weight.sum(dim=1, dtype=torch.int64).double() * step
        if self.bias is not None:
            shift = shift + self.bias.double() / unit
        self.register_buffer("factors", step.float(), persistent=False)
        self.register_buffer("offsets", shift.float(), persistent=False)

    @property
    def out(self) -> ByteGrid | None:
        """Grid of the output, None for float32."""
        return self.end.out

    @property
    def kernel(self) -> str:
        """Name of the kernel that runs."""
        if self.exact:
            return kernels.EXACT_KERNEL
        return "onednn.qlinear_pointwise" if self.in_one_call else "aten._int_mm"

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's answer to x `(..., K)` as `(..., N)`."""
        rows = x.reshape(-1, x.shape[-1])
        y = self._sums(rows) if torch.compiler.is_compiling() or not self.in_one_call else self._in_one_call(rows)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _in_one_call(self, rows: Tensor) -> Tensor:
        call = self._call.of(self.weight)
        if call is None:
            given = (self.weight, self.scales, self.bias, self.grid, self.end, rows.shape)
            call = self._call.keep(self.weight, kernels.prepared_linear(*given))
        return call(rows)

    def _sums(self, rows: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            sums = matmul_op(rows, self.packed, self.form, self.exact).float()
        else:
            sums = kernels.as_float(kernels.matmul(rows, self.weight, self.exact))
        if torch.compiler.is_compiling():
            real = torch.addcmul(self.offsets, sums, self.factors)
        else:
            real = torch.addcmul(self.offsets, sums, self.factors, out=sums)
        out = self.end.out
        if self.end.activation != "none":
            real = ACTIVATIONS[self.end.activation](real)
            return real if out is None else quantize_u8(real, out)
        return real if out is None else round_to_u8(real, 1.0, out)

    def extra_repr(self) -> str:
        """Return the kernel, the grids and the activation in one line."""
        ends = "" if self.end.activation == "none" else f", {self.end.activation}"
        return f"{self.kernel}, in={self.grid}, out={self.end.out or 'float32'}{ends}"
