"""Re-score around the plan in hand and solve again, as far as the model of the loss can be trusted.

Scores taken in the float network misprice a plan in which everything else is quantized too. Around the plan the same
measurement is exact for a few changed sites, and worse the more sites change: so at most `radius` of them may, and the
radius grows where the measured loss agreed and shrinks where it did not (a trust-region method).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

Plan = TypeVar("Plan")
Model = TypeVar("Model")

SHRINKS = 3
"""Smaller radii tried on one model before the search gives up on it."""


@dataclass(frozen=True)
class Step(Generic[Plan]):
    """One plan that was tried.

    Args:
        round: number of the scoring it came from, from 1.
        radius: most sites that were allowed to change.
        plan: what the solver proposed.
        losses: its measured loss per image, shape (images,).
        accepted: whether it took the place of the plan in hand.
    """

    round: int
    radius: int
    plan: Plan
    losses: Tensor
    accepted: bool


def trust_region(
    start: Plan,
    score: Callable[[Plan], Model],
    solve: Callable[[Model, Plan, int], Plan | None],
    measure: Callable[[Plan], Tensor],
    better: Callable[[Tensor, Tensor], bool],
    rounds: int,
    radius: int,
) -> tuple[Plan, list[Step[Plan]]]:
    """Return the best plan found and every step that was tried; never worse than the start by the measured loss.

    Args:
        start: the plan in hand.
        score: plan -> model of the loss around it.
        solve: (model, plan, radius) -> the model's best plan with at most `radius` sites changed, None without one.
        measure: plan -> loss per image, shape (images,).
        better: (losses of the plan in hand, of another) -> whether the other is better beyond the noise.
        rounds: scorings at most.
        radius: sites that may change at first.
    """
    steps: list[Step[Plan]] = []
    best, losses = start, measure(start)
    for number in range(1, rounds + 1):
        model, accepted = score(best), False
        for _ in range(SHRINKS):
            proposed = solve(model, best, radius)
            if proposed is None or proposed == best:
                break
            found = measure(proposed)
            accepted = better(losses, found)
            steps.append(Step(number, radius, proposed, found, accepted))
            if accepted:
                best, losses, radius = proposed, found, 2 * radius
                break
            if radius == 1:
                # The next radius is the same again, and so would be the proposal.
                break
            radius //= 2
        # The same plan would be scored again, with the same answer.
        if not accepted:
            break
    return best, steps
