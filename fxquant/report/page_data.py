"""The report as data: everything the page and the terminal show, as plain JSON values."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

from fxquant.core.errors import OptionError
from fxquant.core.facts import (
    LIMIT_TABLES,
    BitAllocation,
    CostTables,
    Finalists,
    SensitivityMatrix,
    Settings,
    Surrogates,
    Target,
    fits,
    reachable,
    unit_of,
)
from fxquant.core.host import cpu_model, int8_instructions
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import UNITS
from fxquant.passes import uniform_plans
from fxquant.recipes import RECIPES
from fxquant.report.budget_curve import frontier
from fxquant.report.layers import average_bits, finite, layer_rows, model_bytes, most_sensitive
from fxquant.report.operands import operand_rows
from fxquant.report.quantizer_tables import edge_rows, weight_noise
from fxquant.report.rounded_units import rounding

FORMAT_VERSION = 1

EXTRAS = {
    "comparison": "rows {name, accuracy (0..1), bytes, milliseconds, low, high}; each but the name may be missing",
    "data": "what accuracy was measured on, for example '1000 held-out digits'",
    "runtime": "what milliseconds were measured in, for example 'onnxruntime, 1 image, 2 threads'",
    "bytes_on_disk": "size of the exported file",
    "kernels": "layer name -> kernel the runtime was seen to run",
    "parity": "what was compared -> how far it is apart, as text or number",
    "check": "what `fxquant check` found, as `Parity.to_json` gives it",
}
"""Measurement that a caller may add to what the program holds -> its form."""

NO_INSTRUCTIONS = "none: integers may be no faster than float here; measure with fxquant bench"
PACKAGES = ("fxquant", "torch", "numpy", "onnx", "onnxruntime", "PuLP")

STATUS = {
    "optimal": "proved: by the model of {model} no plan within the limits{cost} has a lower loss{borders}",
    "feasible": "the best that the solver found by the model of {model}{borders}; a better plan is not ruled out",
    "measured": "chosen by its measured loss among the plans that were tried; nothing is proved of others",
    "uniform": "one precision everywhere; no plan that was compared had a clearly lower measured loss",
    "manual": "made by hand or for analysis only; nothing was optimised",
}
"""Status of a plan -> what it means."""
CHEAPEST = "{minimized} was minimized by bisection over measured plans; a cheaper plan is not ruled out"


def content(
    program: Program, simulated: Program, held_out_images: int | None = None, extras: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the report as plain JSON values.

    Args:
        program: float graph with plan, sensitivity and costs.
        simulated: the graph with fake-quant of the same plan.
        held_out_images: how many images the plan's loss was measured on, None if they are not known.
        extras: measurements the program does not hold, with the keys of `EXTRAS`.

    Raises:
        OptionError: an extra of unknown name.
    """
    data = overview(program, held_out_images, extras)
    noise = weight_noise(program, simulated)
    for row in data["layers"]:
        row["weight_sqnr_db"] = noise.get(row["name"])
    return {
        **data,
        "frontier": frontier(program),
        "operands": operand_rows(data["layers"]),
        "edges": edge_rows(simulated),
    }


def overview(
    program: Program, held_out_images: int | None = None, extras: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the part of the report that costs nothing, for the terminal and notebooks.

    Args:
        program: as for `content`.
        held_out_images: as for `content`.
        extras: as for `content`.

    Raises:
        OptionError: an extra of unknown name.
    """
    measured = dict(extras or {})
    unknown = sorted(set(measured) - set(EXTRAS))
    if unknown:
        raise OptionError(f"report extras {unknown} are unknown; known: {', '.join(EXTRAS)}")
    layers = layer_rows(program, measured.get("kernels"))
    settings = program[Settings].to_json() | {"target": program[Target].name}
    return {
        "asked": {"budget": program[BitAllocation].asked, "settings": settings, "inputs": _inputs(program)},
        "recipe": _recipe(program[Settings].recipe),
        "outcome": _outcome(program, held_out_images),
        "coverage": coverage(program),
        "plans": _plans(program),
        "layers": layers,
        "sensitive": most_sensitive(program),
        "sensitivity": _sensitivity(program),
        "rounding": rounding(program),
        "passes": [{"name": p.name, "rewrites": p.rewrites, "seconds": p.seconds} for p in program.log],
        "versions": versions(),
        "measured": measured,
    }


def _recipe(name: str | None) -> dict[str, str] | None:
    """Return what is known of the recipe that made the plan, None where it was made without one."""
    if name is None:
        return None
    # A result may be opened where the recipe it was made by is not registered.
    known = {"about": RECIPES[name].about, "source": RECIPES[name].source} if name in RECIPES else {}
    return {"name": name, **known}


def _latency(costs: CostTables, choices: Mapping[str, Choice]) -> dict[str, Any] | None:
    """Return what the latency model predicts of a plan and how sure it is, None where nothing was timed."""
    table = costs.tables.get("latency")
    if table is None:
        return None
    noise = None if table.noise is None else asdict(table.noise)
    return {"predicted_ms": table.of(choices), "float_ms": table.float_cost, "noise": noise}


def _inputs(program: Program) -> list[dict[str, Any]]:
    nodes = [node for node in program.module.graph.nodes if node.op == "placeholder"]
    return [
        {
            "name": str(node.target),
            "shape": [s if isinstance(s, int) else "batch" for s in node.meta["val"].shape],
            "type": str(node.meta["val"].dtype).removeprefix("torch."),
        }
        for node in nodes
    ]


def _outcome(program: Program, held_out_images: int | None) -> dict[str, Any]:
    plan, costs, sites = program[BitAllocation], program[CostTables], program[Sites]
    limits = []
    for name, limit in plan.limits.items():
        row = {"name": name, "limit": limit, "used": plan.used.get(name), "slack": plan.slack.get(name)}
        table = costs.tables.get(LIMIT_TABLES[name][0]) if name in LIMIT_TABLES else None
        if table is not None:
            low, high = (cost / unit_of(name, costs) for cost in reachable(table, sites))
            row |= {"lowest": low, "highest": high}
        limits.append(row)
    if plan.minimized:
        used = plan.used.get(plan.minimized)
        limits.append({"name": plan.minimized, "limit": None, "used": used, "slack": None})
    for name, limit in plan.quality_limits.items():
        measured, bound = plan.quality.get(name), plan.quality_bounds.get(name)
        slack = None if bound is None else finite(limit - bound)
        row = {"name": name, "limit": limit, "used": measured, "slack": slack}
        limits.append({**row, "bound": None if bound is None else finite(bound), "images": plan.quality_images})
    size = model_bytes(program, plan.choices)
    return {
        "status": plan.status,
        "status_text": "; ".join(_status(program, plan)),
        "notes": _notes(program),
        "estimator": plan.estimator,
        "objective": finite(plan.objective),
        "bound": finite(plan.bound),
        "gap": finite(plan.gap),
        "measured_loss": plan.measured_loss,
        "compared_loss": plan.compared_loss,
        "loss_unit": UNITS.get(plan.loss, program[SensitivityMatrix].unit),
        "objective_unit": _matrix(program, plan).unit,
        "held_out_images": plan.images or held_out_images,
        "confidence": program[Settings].confidence,
        "limits": limits,
        "latency": _latency(costs, plan.choices),
        "bytes": size,
        "float_bytes": costs["size"].float_cost,
        "size_ratio": size / costs["size"].float_cost,
        "average_bits": average_bits(program, plan),
        "evaluations": program[SensitivityMatrix].evaluations,
    }


def _notes(program: Program) -> list[str]:
    """Return the notes of all solves that led to the plan, each once."""
    plans = (program[BitAllocation], *_finalists(program).values())
    return list(dict.fromkeys(note for plan in plans for note in plan.notes))


def _finalists(program: Program) -> Mapping[str, BitAllocation]:
    return program[Finalists].plans if Finalists in program else {}


def _status(program: Program, plan: BitAllocation) -> list[str]:
    borders = " and requantization cost together" if program[Settings].requantization_cost else ""
    cost = f" and no larger in {plan.minimized}" if plan.minimized else ""
    text = STATUS[plan.status].format(model=plan.estimator, borders=borders, cost=cost)
    return [text, CHEAPEST.format(minimized=plan.minimized)] if plan.minimized else [text]


def _matrix(program: Program, plan: BitAllocation) -> SensitivityMatrix:
    """Return the matrix that models the plan's loss: that of its estimator, the preferred one for other origins."""
    return program[Surrogates].matrices.get(plan.estimator.split(",")[0], program[SensitivityMatrix])


STORED_ONLY = "{kind} computes in float, with weights that are stored as the plan says"


def coverage(program: Program) -> dict[str, Any]:
    """Return how many layers are quantized and why the others are not; a layer is a weight or an op that multiplies."""
    sites, choices = program[Sites], program[BitAllocation].choices
    reasons: dict[str, list[str]] = {}
    for node, why in sites.refusals.items():
        reasons.setdefault(why, []).append(node)
    for site in sites.sites:
        if choices[site.name].is_float:
            reasons.setdefault("the plan keeps it in float", []).append(site.name)
        elif site.stored:
            reasons.setdefault(STORED_ONLY.format(kind=site.kind), []).append(site.name)
    in_float = sum(len(names) for names in reasons.values())
    layers = len(sites.sites) + len(sites.refusals)
    sentence = f"{layers - in_float} of {layers} layers quantized"
    if in_float:
        counted = "; ".join(f"{why} ({len(names)})" for why, names in reasons.items())
        sentence += f", {in_float} in float because: {counted}"
    return {
        "quantized": layers - in_float,
        "layers": layers,
        "in_float": in_float,
        "reasons": [{"reason": why, "layers": names} for why, names in reasons.items()],
        "sentence": sentence,
    }


def _plans(program: Program) -> list[dict[str, Any]]:
    """Return the chosen plan, the other finalists by measured loss, and uniform plans that did not fit.

    All losses are of weights rounded in one way, as when the plans were compared.
    """
    chosen, known = program[BitAllocation], dict(_finalists(program))
    for name, choices in uniform_plans(program[Sites].sites).items():
        known.setdefault(name, BitAllocation(choices, estimator=name, status="uniform"))
    rows = [_plan_row(program, name, plan, chosen.finalists.get(name)) for name, plan in known.items()]
    if not any(row["chosen"] for row in rows):
        loss = chosen.measured_loss if chosen.compared_loss is None else chosen.compared_loss
        rows.append(_plan_row(program, chosen.estimator, chosen, loss))
    return sorted(rows, key=lambda row: (not row["chosen"], row["name"] != chosen.estimator, *_rank(row)))


def _plan_row(program: Program, name: str, plan: BitAllocation, loss: float | None) -> dict[str, Any]:
    chosen, costs = program[BitAllocation], program[CostTables]
    inside = fits(plan.choices, chosen.limits, costs)
    return {
        "name": name,
        "chosen": plan.choices == chosen.choices,
        "fits": inside,
        "modelled_loss": program[SensitivityMatrix].predict(plan.choices),
        "measured_loss": loss,
        "bytes": model_bytes(program, plan.choices),
        "average_bits": average_bits(program, plan),
    }


def _rank(row: Mapping[str, Any]) -> tuple[bool, float, str]:
    loss = row["measured_loss"] if row["measured_loss"] is not None else row["modelled_loss"]
    return not row["fits"], float(loss or 0.0), str(row["name"])


def _sensitivity(program: Program) -> dict[str, Any]:
    matrix = program[SensitivityMatrix]
    return {
        "estimator": matrix.estimator,
        "unit": matrix.unit,
        "evaluations": matrix.evaluations,
        "candidates": [{"site": c.site, "choice": c.choice.label} for c in matrix.candidates],
        "values": matrix.values.tolist(),
        "scored": [
            {"estimator": name, "evaluations": each.evaluations, "unit": each.unit, "notes": dict(each.notes)}
            for name, each in program[Surrogates].matrices.items()
        ],
    }


def versions() -> dict[str, str]:
    """Return the versions that a result depends on; packages that are not installed are left out."""
    found = {"machine": f"{cpu_model()}, {platform.system()} {platform.machine()}"}
    instructions = int8_instructions()
    if instructions is not None:
        found["int8 instructions"] = instructions or NO_INSTRUCTIONS
    found["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package == "fxquant":
                found[package] = "run from its source tree"
    return found
