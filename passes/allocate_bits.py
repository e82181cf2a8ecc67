"""Choose a precision for every site: the integer quadratic program, one plan per surrogate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxquant.core.allocation import BitAllocation, Finalists
from fxquant.core.budget import Budget
from fxquant.core.cost import CostTables
from fxquant.core.errors import InfeasibleBudgetError, SolverError
from fxquant.core.limits import agrees, fits, infeasible_message, limit_rows, tie_rows, usage
from fxquant.core.program import Program
from fxquant.core.sensitivity import SensitivityMatrix, Surrogates
from fxquant.core.spec import Choice, Site, Sites
from fxquant.passes.allocation import SOLVERS
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class AllocateBits(Pass):
    """Write `Finalists`, the best plan of every surrogate and the uniform plans that fit, and `BitAllocation`.

    Args:
        budget: the limits.
        solver: name of the solver.
        time_limit: seconds for each solve.
        seed: seed of the solver's search.

    Raises:
        InfeasibleBudgetError: no plan keeps the limits; names the reachable range of each.
    """

    budget: Budget
    solver: str = "iqp"
    time_limit: float = 60.0
    seed: int = 0
    reads = (Sites, Surrogates, CostTables)
    writes = (BitAllocation, Finalists)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its plans; the preferred surrogate's is the `BitAllocation`."""
        limits, tables, sites = self.budget.limits, program[CostTables], program[Sites]
        matrices = program[Surrogates].matrices
        plans = {name: self._solve(matrix, sites, tables) for name, matrix in matrices.items()}
        preferred = next(iter(matrices.values()))
        for name, choices in uniform_plans(sites.sites).items():
            if fits(choices, limits, tables):
                plans[name] = BitAllocation(
                    choices,
                    estimator=name,
                    objective=preferred.predict(choices),
                    status="uniform",
                    used=usage(choices, limits, tables),
                    limits=limits,
                )
        return program.with_facts(plans[next(iter(matrices))], Finalists(plans)), 0

    def _solve(self, matrix: SensitivityMatrix, sites: Sites, tables: CostTables) -> BitAllocation:
        limits = self.budget.limits
        (costs, bounds), (ties, sides) = limit_rows(limits, tables, sites), tie_rows(sites)
        solution = SOLVERS[self.solver](
            matrix.values,
            matrix.groups,
            np.concatenate([ties, costs]),
            np.concatenate([sides, bounds]),
            time_limit=self.time_limit,
            seed=self.seed,
        )
        if solution.status == "infeasible":
            raise InfeasibleBudgetError(infeasible_message(self.budget, sites, tables))
        picked = [c for c, chosen in zip(matrix.candidates, solution.choice, strict=True) if chosen]
        choices = {candidate.site: candidate.choice for candidate in picked}
        if len(choices) != len(sites.sites):
            raise SolverError(f"solver {self.solver!r} chose {len(picked)} precisions for {len(sites.sites)} sites")
        return BitAllocation(
            choices,
            estimator=matrix.estimator,
            objective=solution.objective,
            bound=solution.bound,
            gap=solution.gap,
            status=solution.status,
            used=usage(choices, limits, tables),
            limits=limits,
        )


def uniform_plans(sites: tuple[Site, ...]) -> dict[str, dict[str, Choice]]:
    """Return name -> plan that gives every site one precision, sites without that choice their nearest wider one.

    Left out are plans in which a pinned site and another one want two widths of the value that both read.
    """
    plans: dict[str, dict[str, Choice]] = {}
    for choice in sorted({choice for site in sites for choice in site.choices}):
        plan = {site.name: _nearest(site, choice) for site in sites}
        if agrees(sites, plan):
            plans[f"uniform {choice.label}"] = plan
    return plans


def _nearest(site: Site, choice: Choice) -> Choice:
    return next((c for c in site.choices if c >= choice), site.choices[-1])
