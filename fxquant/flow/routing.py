"""Two plans and a router: patches that need more bits get them, within limits on the mean cost of a patch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from fxquant.core.errors import CalibrationError, InfeasibleBudgetError, OptionError
from fxquant.core.facts import EASY, HARD, BitAllocation, Budget, CostTables, RouteFit, Routes, Settings, usage
from fxquant.core.host import SILENT, Reporter
from fxquant.core.ir import Program
from fxquant.core.run import CalibrationSet, gradient_magnitude
from fxquant.flow import allocate as search
from fxquant.flow.score import loss_in_use
from fxquant.flow.stages import ROUTE
from fxquant.passes import Meter

MEANS = ("average_bits", "bops", "bops_ratio")
"""Limits that may hold in the mean over patches: what a patch costs that runs. A file holds both plans."""
LOWER = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
UPPER = (1.05, 1.1, 1.2, 1.35, 1.5, 2.0)
"""Shares of the limits at which plans for easy and for hard patches are solved."""


def check_routes(settings: Settings, budget: Budget | None, images: CalibrationSet) -> None:
    """Fail before the long work where plans cannot be routed.

    Raises:
        OptionError: a limit that does not hold in the mean over patches, or a model that does not take one image.
    """
    check_limits(settings, budget)
    if not settings.routed:
        return
    if len(images.inputs) != 1:
        raise OptionError(f"a router looks at the model's one input, and this model takes {len(images.inputs)}")
    _ = gradient_magnitude(images.inputs[0])


def check_limits(settings: Settings, budget: Budget | None) -> None:
    """Fail where plans are to be routed within limits that do not hold in the mean over patches.

    Raises:
        OptionError: there are such limits, or the network is to be trained.
    """
    if not settings.routed:
        return
    if settings.training is not None:
        raise OptionError(
            f"training {settings.training!r} gives each plan weights of its own, and routed plans share theirs; leave "
            "one of the two out"
        )
    asked = {} if budget is None else {**budget.limits, **budget.quality}
    others = [name for name in asked if name not in MEANS]
    if others:
        raise OptionError(
            f"a router keeps limits in the mean over patches, which {', '.join(others)} does not have; "
            f"limit {', '.join(MEANS)}"
        )


@dataclass(frozen=True)
class Measured:
    """A solved plan with its cost and its loss on every patch, shape (patches,)."""

    program: Program
    used: Mapping[str, float]
    losses: Tensor


@dataclass(frozen=True)
class Split:
    """How patches are shared between two plans: the `count` of largest gradient are hard."""

    count: int
    threshold: float
    hard: Tensor


def split(gradients: Tensor, count: int) -> Split:
    """Return the split whose hard patches are the `count` of largest gradient, fewer where some are equal.

    The threshold lies halfway between the gradients on both sides of it.

    Args:
        gradients: shape (patches,).
        count: 0..patches.
    """
    ordered = gradients.double().sort(descending=True).values
    if count <= 0:
        return Split(0, math.inf, torch.zeros(len(gradients), dtype=torch.bool))
    if count >= len(ordered):
        return Split(len(ordered), -math.inf, torch.ones(len(gradients), dtype=torch.bool))
    threshold = float(((ordered[count - 1] + ordered[count]) / 2).float())
    hard = gradients.float() > threshold
    return Split(int(hard.sum()), threshold, hard)


def most_hard(easy: Mapping[str, float], hard: Mapping[str, float], limits: Mapping[str, float], patches: int) -> int:
    """Return how many patches may be hard: the most k with `easy + (hard - easy) k / patches <= limit` for each limit.

    Args:
        easy: limit -> cost of the plan for easy patches.
        hard: the same for hard ones.
        limits: limit -> its value.
        patches: how many there are.
    """
    shares = [1.0]
    for name, limit in limits.items():
        if hard[name] > limit:
            shares.append((limit - easy[name]) / (hard[name] - easy[name]))
    return math.floor(max(0.0, min(shares)) * patches * (1 + 1e-9))


def route(
    program: Program,
    budget: Budget,
    images: CalibrationSet,
    finish: Callable[[Program], Program],
    reporter: Reporter = SILENT,
) -> Routes:
    """Return the two plans and the threshold of least mean loss whose mean cost keeps the limits.

    Plans are solved at shares of the limits and measured on every patch. For each pair of them the threshold follows
    from the limits: as many of the patches of largest gradient are hard as the mean cost allows.

    Args:
        program: with sensitivity.
        budget: limits on the mean over patches.
        images: unlabelled patches to fit to.
        finish: rounds the weights of a solved plan.
        reporter: shows progress.

    Raises:
        InfeasibleBudgetError: no plan keeps the limits.
    """
    reporter.stage(ROUTE)
    loss = loss_in_use(program, images)
    meter, limits = Meter(program, images, loss), budget.limits

    def measured(share: float) -> Measured:
        asked = Budget.of({name: limit * share for name, limit in limits.items()})
        solved = search.allocate(program, asked, images, SILENT, meter=meter)
        plan = solved[BitAllocation]
        return Measured(solved, usage(plan.choices, limits, program[CostTables]), meter.losses(plan))

    static = measured(1.0)
    gradients = gradient_magnitude(images.inputs[0]).cpu()
    lower, upper = (list(_distinct(measured, shares)) for shares in (LOWER, UPPER))
    best: tuple[float, Measured, Measured, Split] | None = None
    for easy in (*lower, static):
        for hard in (*upper, static):
            parts = split(gradients, most_hard(easy.used, hard.used, limits, len(images)))
            mean = float(torch.where(parts.hard, hard.losses, easy.losses).mean())
            if 0 < parts.count < len(images) and easy is not hard and (best is None or mean < best[0]):
                best = mean, easy, hard, parts
    if best is None:
        raise InfeasibleBudgetError(
            f"no two plans share patches within {budget}: all plans near it cost the same, or there are too few "
            f"patches ({len(images)}); allow more widths, or give another limit"
        )
    mean, easy, hard, parts = best
    share = parts.count / len(images)
    used = {name: hard.used[name] * share + easy.used[name] * (1 - share) for name in limits}
    fit = RouteFit(parts.threshold, share, len(images), used, limits, mean, float(static.losses.mean()))
    reporter.say(
        f"routes: {100 * share:.0f} % of {len(images)} patches are hard; mean loss {mean:.4g}, "
        f"{fit.static_loss:.4g} by one plan of the same limits"
    )
    return Routes({HARD: finish(hard.program), EASY: finish(easy.program)}, fit)


def _distinct(measured: Callable[[float], Measured], shares: Iterable[float]) -> Iterable[Measured]:
    """Yield the plans at shares of the limits, each once, and none where the limits are out of reach."""
    known = []
    for share in shares:
        try:
            found = measured(share)
        except (InfeasibleBudgetError, OptionError):
            # Below the narrowest plan, or above the float model.
            continue
        choices = found.program[BitAllocation].choices
        if choices not in known:
            known.append(choices)
            yield found


def with_routes(
    program: Program,
    chosen: Program,
    budget: Budget,
    parts: Sequence[CalibrationSet | None],
    finish: Callable[[Program], Program],
    reporter: Reporter = SILENT,
) -> Program:
    """Return the chosen program with its routes, where the settings ask for them.

    Args:
        program: with sensitivity, before a plan was chosen.
        chosen: the same with the plan.
        budget, finish, reporter: as for `route`.
        parts: unlabelled patches, in parts; None in the place of those that were not kept.

    Raises:
        InfeasibleBudgetError: no plan keeps the limits.
        CalibrationError: routes are asked for, and there are no images.
    """
    if not program[Settings].routed:
        return chosen
    kept = [part for part in parts if part is not None]
    if not kept:
        raise CalibrationError("a router is fitted to images, and this result was saved without; give calibration")
    return chosen.with_facts(route(program, budget, reduce(CalibrationSet.joined, kept), finish, reporter))
