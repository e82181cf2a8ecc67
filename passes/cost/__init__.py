"""Cost models: one file each, every one a table over the candidates that a linear limit of the program reads."""

from __future__ import annotations

from fxquant.passes.cost import activation, average_bits, bops, size
from fxquant.passes.cost.activation import stored_bytes, worst_rows
from fxquant.passes.cost.given_latency import latency_from_rows
from fxquant.passes.cost.latency_table import LatencyModel, Observation, fit_latency, nonnegative_least_squares
from fxquant.passes.cost.registry import COSTS
from fxquant.passes.cost.site_links import SiteLink, site_links
from fxquant.passes.cost.size import FLOAT_BYTES, site_bytes, stored_bits
