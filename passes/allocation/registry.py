"""The table of allocation solvers: name -> solver, all with one signature."""

from __future__ import annotations

from fxquant.core.registry import Registry
from fxquant.passes.allocation.exhaustive import solve_exhaustive
from fxquant.passes.allocation.flips import solve_flips
from fxquant.passes.allocation.greedy import solve_greedy
from fxquant.passes.allocation.iqp import solve_iqp
from fxquant.passes.allocation.linear_program import solve_linear
from fxquant.passes.allocation.solution import Solver
from fxquant.passes.allocation.threshold import solve_threshold

SOLVERS: Registry[Solver] = Registry("allocation solver")
SOLVERS.register("iqp")(solve_iqp)
SOLVERS.register("linear")(solve_linear)
SOLVERS.register("greedy")(solve_greedy)
SOLVERS.register("threshold")(solve_threshold)
SOLVERS.register("flips")(solve_flips)
SOLVERS.register("exhaustive")(solve_exhaustive)
