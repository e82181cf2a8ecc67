"""fxquant.backends: graph in, something that runs out; one backend, one file."""

# Importing this folder by its top-level name would create a second, unequal copy of every class.
if not __name__.startswith("fxquant."):
    raise ImportError("import fxquant.backends, not backends: the top-level folder is only where the package lives")

from fxquant.backends.base import BACKENDS, Executable, backend
from fxquant.backends.described_target import described, identity, keep_target, kept_target
from fxquant.backends.kernel_rows import KernelRow, target_of
from fxquant.backends.qdq_ops import INT32_LIMIT, dequantize, dequantize_channels, quantize
from fxquant.backends.reference import ReferenceBackend, to_qdq

__all__ = [
    "BACKENDS",
    "INT32_LIMIT",
    "Executable",
    "KernelRow",
    "ReferenceBackend",
    "backend",
    "dequantize",
    "dequantize_channels",
    "described",
    "identity",
    "keep_target",
    "kept_target",
    "quantize",
    "target_of",
    "to_qdq",
]
