"""Usage of limits by a plan, and limits as rows of an integer program."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from fxquant.core.facts.budget import Budget
from fxquant.core.facts.cost_tables import CostTable, CostTables
from fxquant.core.ir import Choice, Site, Sites

LIMIT_TABLES: Mapping[str, tuple[str, str]] = {
    "size_mb": ("size", "absolute"),
    "size_ratio": ("size", "ratio"),
    "file_mb": ("file", "absolute"),
    "file_ratio": ("file", "ratio"),
    "average_bits": ("average_bits", "absolute"),
    "bops": ("bops", "absolute"),
    "bops_ratio": ("bops", "ratio"),
    "activation_mb": ("activation", "absolute"),
    "latency_ms": ("latency", "absolute"),
    "latency_ratio": ("latency", "ratio"),
}
"""Budget limit -> (cost table, whether it is against the float model)."""

SCALES = {"size_mb": 1e6, "file_mb": 1e6, "activation_mb": 1e6}
"""Units of a limit in the unit of its table, where they differ."""


def unit_of(limit: str, tables: CostTables) -> float:
    """Return how much of its table's unit one unit of a limit is."""
    name, kind = LIMIT_TABLES[limit]
    return tables[name].float_cost if kind == "ratio" else SCALES.get(limit, 1.0)


def usage(choices: Mapping[str, Choice], limits: Mapping[str, float], tables: CostTables) -> dict[str, float]:
    """Return what a plan uses of each limit, in the limit's own unit."""
    return {name: tables[LIMIT_TABLES[name][0]].of(choices) / unit_of(name, tables) for name in limits}


def fits(choices: Mapping[str, Choice], limits: Mapping[str, float], tables: CostTables) -> bool:
    """Whether a plan keeps every limit."""
    used = usage(choices, limits, tables)
    return all(used[name] <= limit * (1 + 1e-9) for name, limit in limits.items())


def agrees(sites: tuple[Site, ...], plan: Mapping[str, Choice]) -> bool:
    """Whether the integer sites that read one value take it at one width."""
    widths: defaultdict[str, set[int]] = defaultdict(set)
    for site in sites:
        if not plan[site.name].is_float:
            widths[site.input_tie].add(plan[site.name].activation_bits)
    return all(len(found) == 1 for found in widths.values())


def limit_rows(
    limits: Mapping[str, float], tables: CostTables, sites: Sites
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the limits as `costs @ x <= bounds`, scaled to bounds of absolute value 1.

    A cost that is the largest of several sums gives one row for each sum that some plan can push over the limit.

    Returns:
        costs of shape (k, n) and bounds of shape (k,), dimensionless.
    """
    rows: list[NDArray[np.float64]] = []
    bounds: list[float] = []
    for name, limit in limits.items():
        table = tables[LIMIT_TABLES[name][0]]
        for values, constant in zip(*table.rows, strict=True):
            room = limit * unit_of(name, tables) - float(constant)
            if table.offsets is not None and _extremes(values, sites)[1] <= room:
                continue
            # A common scale keeps the solver's tolerances meaningful for bytes and bit operations alike.
            scale = max(abs(room), 1e-9)
            rows.append(values / scale)
            bounds.append(room / scale)
    return _stacked(rows, sites), np.array(bounds, dtype=np.float64)


def limit_products(limits: Mapping[str, float], tables: CostTables, sites: Sites) -> dict[int, NDArray[np.float64]]:
    """Return the quadratic terms of rows of `limit_rows`: row -> P, so that it reads `costs x + x' P x <= bound`."""
    found: dict[int, NDArray[np.float64]] = {}
    row = 0
    for name, limit in limits.items():
        table = tables[LIMIT_TABLES[name][0]]
        if table.products is not None:
            room = limit * unit_of(name, tables) - table.constant
            found[row] = table.products / max(abs(room), 1e-9)
        row += len(limit_rows({name: limit}, tables, sites)[1])
    return found


def _stacked(rows: list[NDArray[np.float64]], sites: Sites) -> NDArray[np.float64]:
    return np.array(rows, dtype=np.float64).reshape(-1, len(sites.candidates))


def tie_rows(sites: Sites) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the activation ties as `costs @ x <= bounds`: sites that read one value agree on its integer width.

    A site in float does not read the quantized value and agrees with any width. If neither site may be float, two
    opposite rows make both choose a width or neither, a tighter relaxation than "not two widths at once".
    """
    rows: list[NDArray[np.float64]] = []
    bounds: list[float] = []
    for one, other in _tied_pairs(sites.sites):
        widths = sorted({c.activation_bits for site in (one, other) for c in site.choices if not c.is_float})
        # With one width they always agree.
        if len(widths) < 2:
            continue
        loose = any(c.is_float for site in (one, other) for c in site.choices)
        for bits in widths:
            mine = _mask(sites, one, {bits})
            if loose:
                rows.append(mine + _mask(sites, other, set(widths) - {bits}))
                bounds.append(1.0)
            else:
                row = mine - _mask(sites, other, {bits})
                rows += [row, -row]
                bounds += [0.0, 0.0]
    return _stacked(rows, sites), np.array(bounds, dtype=np.float64)


def _tied_pairs(sites: tuple[Site, ...]) -> list[tuple[Site, Site]]:
    """Return the pairs of sites that must agree: consecutive readers of a value, or all pairs if one may be float."""
    ties: defaultdict[str, list[Site]] = defaultdict(list)
    for site in sites:
        ties[site.input_tie].append(site)
    found: list[tuple[Site, Site]] = []
    for members in ties.values():
        # Agreement is transitive along consecutive readers, but not across one in float.
        broken = any(choice.is_float for site in members for choice in site.choices)
        found += combinations(members, 2) if broken else pairwise(members)
    return found


def _mask(sites: Sites, site: Site, widths: set[int]) -> NDArray[np.float64]:
    """Return 1 for the candidates of a site that read its activation at one of these widths."""
    picked = [c.site == site.name and c.choice.activation_bits in widths for c in sites.candidates]
    return np.array(picked, dtype=np.float64)


def infeasible_message(budget: Budget, sites: Sites, tables: CostTables) -> str:
    """Return a message with the reachable range of each limit of a budget that no plan keeps."""
    lines = []
    for name, limit in budget.limits.items():
        low, high = reachable(tables[LIMIT_TABLES[name][0]], sites)
        unit = unit_of(name, tables)
        lines.append(f"{name}={limit:g} (reachable: {low / unit:.4g} to {high / unit:.4g})")
    advice = "raise the limit or allow narrower bits; quantize() without bits takes narrower ones where a budget asks"
    return "no plan keeps the budget " + ", ".join(lines) + f"; {advice}"


def reachable(table: CostTable, sites: Sites) -> tuple[float, float]:
    """Return bounds of what plans can cost, ties and products ignored.

    For a cost that is the largest of several sums, the lower bound is the largest of their minima. It is reached if the
    cheapest choice of a site is the same in every sum.
    """
    ends = [_extremes(values, sites) + constant for values, constant in zip(*table.rows, strict=True)]
    low, high = np.max(ends, axis=0)
    return float(low), float(high)


def _extremes(values: NDArray[np.float64], sites: Sites) -> NDArray[np.float64]:
    """Return the least and the most a sum of one value per site can be, shape (2,)."""
    low = high = 0.0
    start = 0
    for site in sites.sites:
        mine = values[start : start + len(site.choices)]
        low, high, start = low + float(mine.min()), high + float(mine.max()), start + len(mine)
    return np.array([low, high])
