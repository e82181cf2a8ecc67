"""Fallback for a missing or failing CBC: local search, then branch and bound, with a note for the user."""

from __future__ import annotations

import numpy as np

from fxquant.core.errors import first_line
from fxquant.passes.allocation.branch_and_bound import BranchAndBound
from fxquant.passes.allocation.local_search import LocalSearch
from fxquant.passes.allocation.solution import BoolArray, Clock, Problem

# Seconds that the fallback gets at least, also after a CBC that hung for the whole limit.
LEAST = 10.0
KICK_SHARE, KICK_SECONDS = 0.1, 2.0


def fallback_note(error: Exception) -> str:
    """Return the note for the user."""
    return f"CBC failed ({first_line(error, 160)}); fell back to branch and bound"


def solve_by_branching(problem: Problem, seed: int, clock: Clock) -> tuple[BoolArray | None, float]:
    """Minimise x' values x over the plans of a reduced problem; the plan and a proven bound (inf: infeasible).

    Args:
        problem: as `presolve.reduce` leaves it.
        seed: of the local search.
        clock: of the solve; at least `LEAST` seconds, or the whole limit, are taken where less of it is left.
    """
    own = Clock(max(clock.left, min(clock.allowed, LEAST)))
    search = LocalSearch(problem, seed, own)
    proof = BranchAndBound(problem, search, own)
    search.start()
    search.deepen()
    search.within(min(KICK_SECONDS, KICK_SHARE * own.allowed))
    search.kick()
    search.within(np.inf)
    proof.root()
    proof.run()
    return search.choice, proof.bound
