"""What each choice costs: one row of an integer program's linear limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxquant.core.errors import OptionError
from fxquant.core.spec import Candidate, Choice


@dataclass(frozen=True)
class CostTable:
    """Cost of a plan: `constant + sum of values over the chosen candidates`.

    Args:
        candidates: columns, the same order as in the sensitivity matrix.
        values: shape (n,), one cost for each candidate, in `unit`.
        constant: cost that no choice changes, in `unit`.
        float_cost: cost of the float model, in `unit`; ratios are against it.
        unit: a word, for example "bytes", "bits", "bops", "milliseconds".

    Raises:
        OptionError: shapes disagree or a value is not finite.
    """

    candidates: tuple[Candidate, ...]
    values: NDArray[np.float64]
    constant: float
    float_cost: float
    unit: str

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.candidates),):
            raise OptionError(f"cost values have shape {self.values.shape}, expected ({len(self.candidates)},)")
        if not np.isfinite(self.values).all() or not np.isfinite([self.constant, self.float_cost]).all():
            raise OptionError(f"cost table in {self.unit} holds values that are not finite")

    def of(self, choices: Mapping[str, Choice]) -> float:
        """Return the cost of a plan given as site name -> choice."""
        picked = [choices.get(candidate.site) == candidate.choice for candidate in self.candidates]
        return self.constant + float(self.values[np.asarray(picked, dtype=bool)].sum())

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain JSON values, without the candidates."""
        return {
            "values": self.values.tolist(),
            "constant": self.constant,
            "float_cost": self.float_cost,
            "unit": self.unit,
        }

    @staticmethod
    def from_json(document: Mapping[str, Any], candidates: tuple[Candidate, ...]) -> CostTable:
        """Read back what `to_json` gave; the candidates are kept beside it."""
        return CostTable(
            candidates=candidates,
            values=np.asarray(document["values"], dtype=np.float64),
            constant=float(document["constant"]),
            float_cost=float(document["float_cost"]),
            unit=str(document["unit"]),
        )


@dataclass(frozen=True)
class CostTables:
    """Every cost by name: `size` in bytes, `bits`, `bops`, and `latency` where it was measured."""

    tables: dict[str, CostTable]

    def __getitem__(self, name: str) -> CostTable:
        """Return a table.

        Raises:
            OptionError: this cost was not estimated.
        """
        if name not in self.tables:
            raise OptionError(f"cost {name!r} was not estimated; available: {', '.join(self.tables)}")
        return self.tables[name]
