"""The lowering table of ONNX Runtime: which kinds of op it fuses with the Q/DQ nodes around them to an integer kernel.

Read without the ONNX packages, so that a network can be planned for ONNX Runtime where it is not installed.
"""

from __future__ import annotations

from fxquant.backends.exact import Requantization, image_mean, pairwise, window_mean
from fxquant.backends.kernel_rows import KernelRow, formulas_of
from fxquant.backends.onnx.ort_formulas import add, average, mean, mul, quantize, weighted

RUNTIME_KERNELS: dict[str, KernelRow] = {
    "conv": KernelRow("QLinearConv", writes_integers=True, layer=weighted),
    "linear": KernelRow("QGemm", layer=weighted),
    "add": KernelRow("QLinearAdd", join=pairwise(add)),
    "mul": KernelRow("QLinearMul", join=pairwise(mul)),
    "sigmoid": KernelRow("QLinearSigmoid"),
    "hard_sigmoid": KernelRow("HardSigmoid between conversions"),
    "avg_pool": KernelRow("QLinearAveragePool", join=window_mean(average)),
    "global_pool": KernelRow("QLinearGlobalAveragePool", join=image_mean(mean)),
    "matmul": KernelRow(refuse="a product of two activations is uint8 x uint8 here: 110 GOP/s, no faster than float32"),
    "softmax": KernelRow(
        refuse="the integer softmax is 6.6 times slower than the float one (7.8 against 1.2 ms in DeiT-tiny)"
    ),
}
"""Kind of op -> the integer kernel."""


def runtime_formulas() -> Requantization:
    """Return how ONNX Runtime rounds."""
    return formulas_of(RUNTIME_KERNELS, quantize)
