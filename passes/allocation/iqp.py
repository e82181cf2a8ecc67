"""The exact solver: local search, certified relaxation, CBC on small remainders, branch and bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from fxquant.core.errors import SolverError
from fxquant.passes.allocation import cbc
from fxquant.passes.allocation.branch_and_bound import BranchAndBound
from fxquant.passes.allocation.linear_program import solve_diagonal
from fxquant.passes.allocation.linearise import pair_count, solve_linearised
from fxquant.passes.allocation.local_search import LocalSearch
from fxquant.passes.allocation.presolve import reduce
from fxquant.passes.allocation.solution import Clock, Problem, Solution, answer
from fxquant.passes.allocation.without_cbc import fallback_note

# CBC mostly closes linearised remainders of this many pair variables in well under a second; one that
# takes longer than this goes to branch and bound, with the bound that CBC has reached.
CBC_PAIRS, CBC_SECONDS = 300, 2.0
# Part of the time limit for the descents before the relaxation starts, and for kicks after them with a
# ceiling in seconds: on large problems the bound must not be left without time.
START_SHARE, KICK_SHARE, KICK_SECONDS = 0.2, 0.1, 2.0


def solve_iqp(
    values: ArrayLike,
    groups: Sequence[ArrayLike],
    costs: ArrayLike,
    limits: ArrayLike,
    *,
    time_limit: float = 60.0,
    seed: int = 0,
    products: Mapping[int, ArrayLike] | None = None,
) -> Solution:
    """Minimise x' values x over one-hot x with costs x <= limits, with a proven bound at any time.

    The program is CLADO's (Deng et al., 2023, eq. 10) with any number of limits; it need not be convex.
    Steps: ties merged and impossible choices dropped; CBC's plan for the diagonal and exchange search
    give the incumbent; multipliers of the doubly nonnegative relaxation prove a bound and exclude
    choices; CBC solves the linearised remainder where it is small; best-first branch and bound the rest.
    A time-out or KeyboardInterrupt returns the best plan with its bound, the latter marked as interrupted.
    Where CBC is missing or fails, branch and bound does its part too, and a note says so.

    Args:
        values: (n, n) symmetric, any unit; entries inside one group off the diagonal never count.
        groups: one index array per one-hot group; together a partition of 0..n-1.
        costs: (k, n), one row per limit, negative entries allowed; k may be 0. An equality, for example
            a tie between two groups, is two opposite rows.
        limits: (k,).
        products: row -> (n, n), at least 0, for rows that read costs x + x' products x <= limit: what two choices
            cost together. The relaxation leaves it out until one of the two is fixed; the search and CBC do not.
        time_limit: wall-clock seconds.
        seed: of the local search; equal seeds and enough time give equal plans.

    Returns:
        The plan with objective, bound, gap = (objective - bound) / max(|objective|, 1e-12) (0 when
        proved optimal), status "optimal", "feasible" or "infeasible", and seconds.

    Raises:
        OptionError: unusable arrays or time limit.
        SolverError: the time ended before any plan was found or all were excluded.
    """
    clock = Clock(time_limit)
    problem = Problem.checked(values, groups, costs, limits, products)
    reduced = reduce(problem)
    if reduced is None:
        return answer(problem, None, np.inf, clock)
    search = LocalSearch(reduced.problem, seed, clock)
    proof = BranchAndBound(reduced.problem, search, clock)
    notes: list[str] = []
    interrupted = False
    try:
        bound = _solve(reduced.problem, search, proof, clock, notes)
    except KeyboardInterrupt:
        # Anytime: what is known so far is the answer; without any plan there is nothing to return.
        if search.choice is None:
            raise
        bound, interrupted = proof.bound, True
    if search.choice is None:
        if bound == np.inf:
            return answer(problem, None, np.inf, clock, notes)
        raise SolverError(f"no plan found within {time_limit} s and none excluded; allow more time")
    return answer(problem, reduced.expand(search.choice), bound, clock, notes, interrupted)


def _solve(problem: Problem, search: LocalSearch, proof: BranchAndBound, clock: Clock, notes: list[str]) -> float:
    """Fill `search` with the best plan and return the proven bound (inf without a plan: infeasible)."""
    diagonal = np.diag(problem.values)
    linear = not np.count_nonzero(problem.values - np.diag(diagonal))
    # Without pair terms CBC's program is exact, and descents would only delay it.
    search.within(START_SHARE * clock.allowed)
    if not linear:
        search.start()
    if linear or search.choice is None:
        try:
            # Half of the time: the fallback for a CBC that hangs needs the rest.
            choice, bound = solve_diagonal(problem, diagonal, Clock(clock.allowed / 2))
        except cbc.FAILURES as error:
            notes.append(fallback_note(error))
            search.start()
        else:
            if choice is None and bound == np.inf:
                return np.inf
            if choice is not None:
                search.improve(np.flatnonzero(choice))
                if linear:
                    return bound
    search.deepen()
    search.within(min(KICK_SECONDS, KICK_SHARE * clock.allowed))
    search.kick()
    search.within(np.inf)
    proof.root()
    # Reduced-cost fixing at the root often leaves so few choices that one small linear program closes the rest.
    remainder = proof.remainder
    if remainder is not None and clock.left:
        small = remainder.problem()
        if pair_count(small) <= CBC_PAIRS:
            try:
                choice, bound = solve_linearised(small, Clock(min(clock.left, CBC_SECONDS)))
            except cbc.FAILURES as error:
                notes.append(fallback_note(error))
            else:
                if choice is not None:
                    search.improve(remainder.full_plan(np.flatnonzero(choice)))
                proof.raise_bound(bound + remainder.constant)
    proof.run()
    return proof.bound
