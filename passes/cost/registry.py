"""The table of cost models that need nothing but the graph and the target."""

from __future__ import annotations

from collections.abc import Callable

from fxquant.core.facts import CostTable, Target
from fxquant.core.ir import Program
from fxquant.core.registry import Registry

CostModel = Callable[[Program, Target], CostTable]
"""(program with Sites and EdgeGroups, target) -> table over the program's candidates."""

COSTS: Registry[CostModel] = Registry("cost model")
"""Name -> cost model."""
