"""`size`: bytes really stored for weights, scales, zero-points and biases."""

from __future__ import annotations

from math import ceil

import numpy as np
from torch import Tensor

from fxquant.core.facts import CostTable, Target
from fxquant.core.ir import Choice, EdgeGroups, Program, Site, Sites, tensor_at
from fxquant.passes.cost.registry import COSTS

FLOAT_BYTES = 4
SCALE_BYTES = 4
ZERO_POINT_BYTES = 1
BIAS_BYTES = 4


def stored_bits(site: Site, choice: Choice, target: Target) -> float:
    """Return the bits of one site's weights as they are stored, without scales and without filling up the last byte.

    A width the file format has no type for is stored in the target's next one.
    """
    return site.weight_count * target.stored_bits(choice.weight)


def site_bytes(site: Site, choice: Choice, target: Target) -> int:
    """Return the bytes of one site: stored weights, their scales and zero-points, an int32 bias."""
    if choice.is_float:
        return FLOAT_BYTES * (site.weight_count + site.bias_count)
    scales = site.channels if target.per_channel else 1
    grids = scales * (SCALE_BYTES + ZERO_POINT_BYTES)
    return ceil(stored_bits(site, choice, target) / 8) + grids + BIAS_BYTES * site.bias_count


@COSTS.register("size")
def size(program: Program, target: Target) -> CostTable:
    """Return bytes per candidate; the constant is what stays in float and the scales of the activations."""
    sites, module = program[Sites], program.module
    weighted = {name for site in sites.sites for name in site.nodes}
    read: dict[str, int] = {}
    rest: dict[str, int] = {}
    for node in (n for n in module.graph.nodes if n.op == "get_attr"):
        path = str(node.target)
        read[path] = _bytes(tensor_at(module, path))
        # A table that an embedding reads too is stored twice: as it is for the one, on the grid for the other.
        if any(user.name not in weighted for user in node.users):
            rest[path] = read[path]
    constant = sum(rest.values()) + len(program[EdgeGroups].producers) * (SCALE_BYTES + ZERO_POINT_BYTES)
    values = [site_bytes(sites.by_name(c.site), c.choice, target) for c in sites.candidates]
    return CostTable(
        sites.candidates, np.array(values, dtype=np.float64), float(constant), float(sum(read.values())), "bytes"
    )


def _bytes(tensor: Tensor) -> int:
    # The yardstick is the float32 model, whatever type the parameters happen to have.
    return tensor.numel() * (FLOAT_BYTES if tensor.is_floating_point() else tensor.element_size())
