"""Allocation: which choice each group gets, under linear limits, exactly or approximately.

`solve_iqp` is the solver of the product; `SOLVERS` lists all by name, with one signature.
"""

from fxquant.core.registry import Registry
from fxquant.passes.allocation.exhaustive import solve_exhaustive
from fxquant.passes.allocation.greedy import solve_greedy
from fxquant.passes.allocation.iqp import solve_iqp
from fxquant.passes.allocation.linear import solve_linear
from fxquant.passes.allocation.solution import Solution, Solver

SOLVERS: Registry[Solver] = Registry("allocation solver")
SOLVERS.register("iqp")(solve_iqp)
SOLVERS.register("linear")(solve_linear)
SOLVERS.register("greedy")(solve_greedy)
SOLVERS.register("exhaustive")(solve_exhaustive)

__all__ = ["SOLVERS", "Solution", "Solver", "solve_iqp"]
