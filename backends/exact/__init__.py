"""The exact integer reference that other backends are compared with, edge by edge."""

from __future__ import annotations

from fxquant.backends.exact.edge_trace import (
    BATCH,
    Integers,
    Trace,
    Tracer,
    activation_quantizers,
    edge_labels,
    layer_name,
    outputs,
    run_traced,
    value_names,
)
from fxquant.backends.exact.integer_graph import exact_graph
from fxquant.backends.exact.requantize import (
    JoinFormula,
    LayerFormula,
    Operands,
    Pool,
    Requantization,
    Sums,
    centred,
    f32,
    fma,
    image_mean,
    pairwise,
    window_mean,
)
