"""Allocation: which choice each group gets, under linear limits, exactly or approximately.

`solve_iqp` is the solver of the product; `SOLVERS` lists all by name, with one signature.
"""

from __future__ import annotations

from fxquant.passes.allocation.borders import (
    border_cost,
    border_terms,
    borders_of,
    modelled_plan,
    neighbours,
    one_hot,
)
from fxquant.passes.allocation.convexify import Lift, certify
from fxquant.passes.allocation.exhaustive import solve_exhaustive
from fxquant.passes.allocation.iqp import solve_iqp
from fxquant.passes.allocation.leftover import fill
from fxquant.passes.allocation.linear_program import add_choices
from fxquant.passes.allocation.linearise import solve_linearised
from fxquant.passes.allocation.local_search import LocalSearch
from fxquant.passes.allocation.loss_model import LossModel
from fxquant.passes.allocation.plan_swaps import descent, swaps
from fxquant.passes.allocation.presolve import reduce
from fxquant.passes.allocation.registry import SOLVERS
from fxquant.passes.allocation.relaxation import cold, relax
from fxquant.passes.allocation.rescore import Step, trust_region
from fxquant.passes.allocation.solution import BoolArray, Clock, FloatArray, Problem, Solution
from fxquant.passes.allocation.subproblem import Subproblem
from fxquant.passes.allocation.threshold import cheapest_within, error_ratios, solve_threshold
from fxquant.passes.allocation.without_cbc import solve_by_branching
