"""`latency` from the rows of a target file, for hardware that is not this machine."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np

from fxquant.core.errors import OptionError
from fxquant.core.facts import CostTable, Target, found, site_types
from fxquant.core.ir import FLOAT, Choice, Program, Site, Sites
from fxquant.passes.cost.size import site_bytes


def latency_from_rows(program: Program, target: Target) -> CostTable:
    """Return milliseconds per candidate from the target's rows, the first that matches a layer and a precision.

    Layers add up; what no choice changes has no row and counts as nothing. The float model's cost, which ratios are
    against, is that of every layer by the row for "float".

    Raises:
        OptionError: no row matches a layer at one of its precisions, or in float.
    """
    sites = program[Sites]
    types = site_types(program.module.graph, sites.sites)
    names = [site.name for site in sites.sites]
    matches = [found(row.layers, names, types) for row in target.latency]
    values = [_milliseconds(sites.by_name(c.site), c.choice, target, matches) for c in sites.candidates]
    in_float = sum(_milliseconds(site, FLOAT, target, matches) for site in sites.sites)
    return CostTable(sites.candidates, np.array(values, dtype=np.float64), 0.0, in_float, "milliseconds")


def _milliseconds(site: Site, choice: Choice, target: Target, matches: list[list[str]]) -> float:
    for row, names in zip(target.latency, matches, strict=True):
        if site.name in names and fnmatchcase(choice.label, row.precision):
            megabytes = site_bytes(site, choice, target) / 1e6
            return row.ms + row.ms_per_million_macs * site.macs / 1e6 + row.ms_per_megabyte * megabytes
    raise OptionError(
        f"target {target.name!r} has no latency row for layer {site.name!r} ({site.kind}) at {choice.label}; add one, "
        'for example {"layers": "*", "precision": "*", "ms": 0.1} as the last'
    )
