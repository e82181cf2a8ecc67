"""The facts that passes read and write: settings, target, sites' costs and scores, plans, ranges, grids, roundings."""

from __future__ import annotations

from fxquant.core.facts.budget import QUALITIES, Budget, BudgetLike
from fxquant.core.facts.channel_scales import ChannelScales
from fxquant.core.facts.cost_tables import CostTable, CostTables, Noise
from fxquant.core.facts.expressions import matched
from fxquant.core.facts.fake_quant_nodes import FakeQuantNodes
from fxquant.core.facts.limits import (
    LIMIT_TABLES,
    agrees,
    fits,
    infeasible_message,
    limit_products,
    limit_rows,
    reachable,
    tie_rows,
    unit_of,
    usage,
)
from fxquant.core.facts.norm_statistics import NormStatistics, Statistics
from fxquant.core.facts.option_fields import FUNCTION, Option, Options, function_name, literals, options_of, rules
from fxquant.core.facts.patterns import Types, found, matching, module_types, site_types
from fxquant.core.facts.plan import BitAllocation, BudgetCurve, Finalists
from fxquant.core.facts.ranges import (
    BINS,
    GAUSSIAN_STEPS,
    Histogram,
    Ranges,
    clip_error,
    gaussian_range,
    merged,
    mse_range,
)
from fxquant.core.facts.rounding import Rounding, UnitRecord
from fxquant.core.facts.routes import EASY, HARD, RouteFit, Routes
from fxquant.core.facts.sensitivity_matrix import SensitivityMatrix, Surrogates
from fxquant.core.facts.settings import EFFORTS, EffortName, ScoringRounding, Settings
from fxquant.core.facts.target import LatencyRow, Target
from fxquant.core.facts.target_file import SUFFIX, read_target, target_to_json, write_target
from fxquant.core.facts.weight_grids import WeightGrids
