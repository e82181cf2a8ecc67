"""fxquant.backends: graph in, something that runs out; one package for each runtime."""

# Importing this folder by its top-level name would create a second, unequal copy of every class.
if not __name__.startswith("fxquant."):
    raise ImportError("import fxquant.backends, not backends: the top-level folder is only where the package lives")

from fxquant.backends.base import (
    BACKENDS,
    Backend,
    Executable,
    Export,
    Packages,
    Runtime,
    backend,
    backends,
    is_known_by_name,
    lower,
    runtimes,
)
from fxquant.backends.explicit_graph import to_qdq
from fxquant.backends.kernel_rows import KernelRow, target_of
from fxquant.backends.qdq_ops import INT32_LIMIT, dequantize, dequantize_channels, quantize, stored_channels
