"""One row per layer: what was chosen, what it costs, and what one step wider would bring."""

from __future__ import annotations

from collections.abc import Mapping
from shlex import quote
from typing import Any

import numpy as np

from fxquant.core.facts import BitAllocation, CostTable, CostTables, SensitivityMatrix, Target
from fxquant.core.ir import Candidate, Choice, Program, Site, Sites
from fxquant.passes.cost import FLOAT_BYTES, site_bytes, stored_bits

SHARE = 0.5
"""Share of the loss that the most sensitive layers make up at least."""


def layer_rows(program: Program, kernels: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Return a plain row for each site, in graph order.

    Args:
        program: with plan, sensitivity and costs.
        kernels: layer name -> kernel the runtime was seen to run, where that is known.
    """
    rows = [_row(program, site, program[Target]) for site in program[Sites].sites]
    size, macs = model_bytes(program, program[BitAllocation].choices), sum(row["macs"] for row in rows)
    for row in rows:
        row["share_of_bytes"] = row["bytes"] / size if size else 0.0
        row["share_of_macs"] = row["macs"] / macs if macs else 0.0
        row["kernel"] = (kernels or {}).get(row["name"])
    return rows


def most_sensitive(program: Program) -> dict[str, Any] | None:
    """Return the fewest layers that make up half of what all layers lose alone at their widest integer precision.

    Returns:
        `layers` by loss, the largest first, their `share` of the loss, and the `option` that keeps them in float; None
        where nothing is lost.
    """
    matrix = program[SensitivityMatrix]
    alone = {c.site: float(matrix.values[k, k]) for k, c in enumerate(matrix.candidates) if not c.choice.is_float}
    # Candidates of a site ascend, so its last one stays. Noise may make a loss negative.
    ranked = sorted(((max(loss, 0.0), name) for name, loss in alone.items()), reverse=True)
    total = sum(loss for loss, _ in ranked)
    if total <= 0:
        return None
    chosen, held = [], 0.0
    for loss, name in ranked:
        chosen.append(name)
        held += loss
        if held >= SHARE * total:
            break
    return {"layers": chosen, "share": held / total, "option": " ".join(f"--keep-float {quote(n)}" for n in chosen)}


def model_bytes(program: Program, choices: Mapping[str, Choice]) -> float:
    """Return the bytes of a plan, layers put in float by hand included."""
    sites = program[Sites].sites
    return program[CostTables]["size"].constant + sum(_bytes(program, site, choices[site.name]) for site in sites)


def _bytes(program: Program, site: Site, choice: Choice) -> float:
    """Return the bytes of a layer at a precision, one that no candidate has (float by hand) included."""
    found = _cost(program[CostTables]["size"], site, choice)
    return site_bytes(site, choice, program[Target]) if found is None else found


def _cost(table: CostTable, site: Site, choice: Choice) -> float | None:
    """Return what a layer's precision costs, None where it is no candidate."""
    column = Candidate(site.name, choice)
    return float(table.values[table.candidates.index(column)]) if column in table.candidates else None


def average_bits(program: Program, plan: BitAllocation) -> float | None:
    """Return the stored bits per weight over the layers a plan quantizes, None if it quantizes none."""
    sites, table = program[Sites].sites, program[CostTables]["average_bits"]
    integer = {site: plan.choices[site.name] for site in sites if not plan.choices[site.name].is_float}
    weights, every = (sum(site.weight_count for site in known) for known in (integer, sites))
    stored = 0.0
    for site, choice in integer.items():
        share = _cost(table, site, choice)
        stored += stored_bits(site, choice, program[Target]) if share is None else share * every
    return stored / weights if weights else None


def finite(value: float) -> float | None:
    """Return the value, None where JSON cannot hold it."""
    return float(value) if np.isfinite(value) else None


def _row(program: Program, site: Site, target: Target) -> dict[str, Any]:
    matrix, choices = program[SensitivityMatrix], program[BitAllocation].choices
    choice = choices[site.name]
    columns = {c.choice.label: k for k, c in enumerate(matrix.candidates) if c.site == site.name}
    chosen = np.array([choices.get(c.site) == c.choice for c in matrix.candidates], dtype=np.float64)
    at = columns.get(choice.label)
    used = _bytes(program, site, choice)
    return {
        "name": site.name,
        "kind": site.kind,
        "weights": site.weight_count,
        "channels": site.channels,
        "uses": len(site.nodes),
        "macs": site.macs,
        "choice": choice.label,
        "choices": [c.label for c in site.choices],
        "weight_bits": choice.weight_bits,
        "activation_bits": choice.activation_bits,
        "stored_bits": target.stored_bits(choice.weight),
        "bytes": used,
        "float_bytes": FLOAT_BYTES * (site.weight_count + site.bias_count),
        "saved_bytes": _bytes(program, site, site.choices[-1]) - used,
        "losses": {label: float(matrix.values[k, k]) for label, k in columns.items()},
        "stderr": {label: finite(matrix.stderr[k, k]) for label, k in columns.items()},
        "loss": 0.0 if at is None else float(matrix.values[at, at]),
        "contribution": 0.0 if at is None else float(matrix.values[at] @ chosen),
        "next_step": None if at is None else _next_step(program, site, choice, chosen),
    }


def _next_step(program: Program, site: Site, choice: Choice, chosen: np.ndarray[Any, Any]) -> dict[str, Any] | None:
    """Return what the next wider precision of a site would save in modelled loss, all else equal, and cost in bytes."""
    matrix, wider = program[SensitivityMatrix], next((c for c in site.choices if c > choice), None)
    if wider is None:
        return None
    moved = chosen.copy()
    for k, candidate in enumerate(matrix.candidates):
        if candidate.site == site.name:
            moved[k] = float(candidate.choice == wider)
    return {
        "choice": wider.label,
        "loss_saved": float(chosen @ matrix.values @ chosen - moved @ matrix.values @ moved),
        "extra_bytes": _bytes(program, site, wider) - _bytes(program, site, choice),
    }
