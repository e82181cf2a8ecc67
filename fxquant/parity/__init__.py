"""Parity: do the runtimes compute what the simulated graph says?"""

from __future__ import annotations

from fxquant.parity.edge_check import AGREEMENT, Pair, Parity, as_json, check, compare, default_runtimes
