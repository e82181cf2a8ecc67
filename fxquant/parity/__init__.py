"""Parity: do the runtimes compute what the simulated graph says?"""

from __future__ import annotations

from fxquant.parity.answer_steps import AGREEMENT
from fxquant.parity.edge_check import Pair, Parity, as_json, check, compare, default_runtimes
