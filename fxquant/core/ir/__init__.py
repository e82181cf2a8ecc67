"""The intermediate representation: programs, the op table, specs, edges, fake-quant nodes and their arithmetic."""

from __future__ import annotations

from fxquant.core.ir.autograd import differentiable, gradients
from fxquant.core.ir.edges import EdgeGroups, PlanEdges, QuantizedEdges
from fxquant.core.ir.end_sites import end_sites
from fxquant.core.ir.fake_quant import FINEST_SHARE, FakeQuantize, round_learned, round_to_levels, whole_levels
from fxquant.core.ir.graphs import (
    constant,
    consumers,
    edges_between,
    erase_dead,
    finish,
    fork,
    free_path,
    insert_after,
    is_constant,
    nodes_by_name,
    put_tensor,
    resolve,
    set_module,
    set_parameter,
    show,
    tensor_at,
    trace,
    trace_line,
)
from fxquant.core.ir.grid import SMALLEST_SCALE, Grid
from fxquant.core.ir.levels import HIGHEST_LEVEL, LOWEST_LEVEL, borders_of, nearest_level
from fxquant.core.ir.ops import (
    BETWEEN,
    OPS,
    RECURRENT,
    REFUSED,
    SINGLE,
    STORED,
    OpRule,
    ScaleRule,
    activation_inputs,
    arguments,
    clip_bounds,
    needs_two_tensors,
    rule_of,
    stored_weights,
)
from fxquant.core.ir.program import PassRecord, Program
from fxquant.core.ir.recurrent_shapes import recurrent_shapes
from fxquant.core.ir.row_grid import RowGrid
from fxquant.core.ir.shapes import (
    counts_images,
    images_axis,
    sample_elements,
    sample_shape,
    shape_of,
    sizes,
    traced,
    traced_images,
)
from fxquant.core.ir.spec import (
    FLOAT,
    Candidate,
    Choice,
    Edge,
    QuantSpec,
    Site,
    Sites,
    activation_spec,
    site_name,
    weight_spec,
)
from fxquant.core.ir.weight_format import FLOAT_BITS, FORMAT_KINDS, MAX_BITS, WeightFormat
