"""The stages of a run, as they are numbered for the user."""

from __future__ import annotations

from fxquant.core.facts import Budget, Settings

CAPTURE = "capture the graph"
CALIBRATE = "calibrate"
MEASURE_FILE = "measure files"
SCORE = "score layers"
LATENCY = "measure latency"
CHOOSE = "choose a plan"
ROUND = "round weights"
ROUTE = "fit the router"
RESHAPE = "choose channels"
TRAIN = "train"
CURVE = "measure other budgets"


def stages(settings: Settings, budget: Budget | None) -> list[str]:
    """Return what `quantize` will do, in order.

    Args:
        settings: of the run.
        budget: the limits; None only scores.
    """
    chooses, curve = budget is not None, settings.settled().curve
    asked = {
        CAPTURE: True,
        RESHAPE: chooses and bool(settings.expand or settings.prune),
        CALIBRATE: True,
        MEASURE_FILE: budget is not None and budget.needs_file,
        SCORE: True,
        LATENCY: budget is not None and budget.needs_latency,
        CHOOSE: chooses,
        # Within limits on answers every plan that is tried is rounded, so that this is no stage of its own.
        ROUND: budget is not None and not budget.quality and settings.rounding != "nearest",
        TRAIN: budget is not None and not budget.quality and settings.training is not None,
        CURVE: curve > 0,
        ROUTE: chooses and settings.routed,
    }
    return [name for name, happens in asked.items() if happens]
