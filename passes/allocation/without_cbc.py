"""What takes CBC's place where it is missing or fails: our own search and branch and bound, and a line that says so."""

from __future__ import annotations

import numpy as np

from fxquant.core.errors import first_line
from fxquant.passes.allocation.branch_and_bound import BranchAndBound
from fxquant.passes.allocation.local_search import LocalSearch
from fxquant.passes.allocation.solution import BoolArray, Clock, Problem

# Seconds that are left at least for what takes the place of a CBC that has spent the whole limit.
LEAST = 10.0
KICK_SHARE, KICK_SECONDS = 0.1, 2.0


def told(error: Exception) -> str:
    """Return the line for the user."""
    return f"CBC was of no use ({first_line(error, 160)}); our own branch and bound took its place"


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
