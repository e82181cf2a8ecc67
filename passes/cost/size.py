"""`size`: bytes of weights, scales and biases as they are stored."""

from __future__ import annotations

from math import ceil

import numpy as np
import torch
from torch import Tensor

from fxquant.core.facts import CostTable, Target, WeightGrids
from fxquant.core.ir import Candidate, Choice, EdgeGroups, Program, Site, Sites, tensor_at
from fxquant.core.storage import packed_bytes
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
    """Return the bytes of one site at the width that the target declares: weights, their scales, an int32 bias."""
    if choice.is_float:
        return FLOAT_BYTES * (site.weight_count + site.bias_count)
    return ceil(stored_bits(site, choice, target) / 8) + _beside(site, target)


def candidate_bytes(program: Program, candidate: Candidate, target: Target) -> int:
    """Return the bytes of one candidate: its integers in their shortest form where the target stores that."""
    site, packed = program[Sites].by_name(candidate.site), shortest_bytes(program, candidate, target)
    return site_bytes(site, candidate.choice, target) if packed is None else packed + _beside(site, target)


def shortest_bytes(program: Program, candidate: Candidate, target: Target) -> int | None:
    """Return the bytes of one candidate's integers in their shortest form, None where the target does not store that.

    Counted are the weights as they were rounded beforehand, to their nearest values where they were not: the table of a
    codebook, and rows that need fewer bits than their format has, are known from the integers alone.
    """
    site = program[Sites].by_name(candidate.site)
    if candidate.choice.is_float or not target.packs or WeightGrids not in program:
        return None
    grids, weight = program[WeightGrids], candidate.choice.weight
    grid = grids.at(site.name, weight)
    with torch.no_grad():
        q = grid.quantize(grids.rounded.get((site.name, weight), tensor_at(program.module, site.weight)))
    rows = q.to(torch.int8).movedim(grid.spec.channel_axis or 0, 0).reshape(site.channels, -1)
    return packed_bytes(rows.contiguous().cpu().numpy())


def _beside(site: Site, target: Target) -> int:
    """Return the bytes of a site's scales and bias; the zero-points of weights are zeros, which layers share."""
    return (site.channels if target.per_channel else 1) * SCALE_BYTES + BIAS_BYTES * site.bias_count


@COSTS.register("size")
def size(program: Program, target: Target) -> CostTable:
    """Return bytes per candidate; the constant is what stays in float and the scales of the activations."""
    sites, module = program[Sites], program.module
    weighted = {name for site in sites.sites if not site.stored for name in site.readers}
    stored = {site.weight for site in sites.sites if site.stored}
    read: dict[str, int] = {}
    rest: dict[str, int] = {}
    for node in (n for n in module.graph.nodes if n.op == "get_attr"):
        path = str(node.target)
        read[path] = _bytes(tensor_at(module, path))
        # A table that an embedding reads too is stored twice: as it is for the one, on the grid for the other.
        if path not in stored and any(user.name not in weighted for user in node.users):
            rest[path] = read[path]
    constant = sum(rest.values()) + len(program[EdgeGroups].producers) * (SCALE_BYTES + ZERO_POINT_BYTES)
    # Activations at another width leave a weight as it is.
    known = {(c.site, c.choice.weight): c for c in sites.candidates}
    found = {key: candidate_bytes(program, candidate, target) for key, candidate in known.items()}
    values = [found[c.site, c.choice.weight] for c in sites.candidates]
    return CostTable(
        sites.candidates, np.array(values, dtype=np.float64), float(constant), float(sum(read.values())), "bytes"
    )


def _bytes(tensor: Tensor) -> int:
    # The yardstick is the float32 model, whatever type the parameters happen to have.
    return tensor.numel() * (FLOAT_BYTES if tensor.is_floating_point() else tensor.element_size())
