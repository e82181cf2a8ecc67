"""The lowering table of ONNX Runtime: which kinds of op it fuses with the Q/DQ nodes around them to an integer kernel.

Read without the ONNX packages, so that a network can be planned for ONNX Runtime where it is not installed.
"""

from __future__ import annotations

from fxquant.backends.kernel_rows import KernelRow

RUNTIME_KERNELS: dict[str, KernelRow] = {
    "conv": KernelRow("QLinearConv", writes_integers=True),
    "linear": KernelRow("QGemm"),
    "add": KernelRow("QLinearAdd"),
    "mul": KernelRow("QLinearMul"),
    "avg_pool": KernelRow("QLinearAveragePool"),
    "global_pool": KernelRow("QLinearGlobalAveragePool"),
    "matmul": KernelRow(refuse="a product of two activations is uint8 x uint8 here: 110 GOP/s, no faster than float32"),
    "softmax": KernelRow(
        refuse="the integer softmax is 6.6 times slower than the float one (7.8 against 1.2 ms in DeiT-tiny)"
    ),
}
"""Kind of op -> the integer kernel."""
