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
    """Cost of a plan: `constant + sum of values over the chosen candidates`, or the largest of several such sums.

    A cost with rows, such as the peak of a memory, is `constant + max over rows (offsets + values over the chosen)`:
    no single sum, but a limit on it is one linear limit per row.

    Args:
        candidates: columns, the same order as in the sensitivity matrix.
        values: shape (n,), one cost for each candidate, or (rows, n) with `offsets`, in `unit`.
        constant: cost that no choice changes, in `unit`.
        float_cost: cost of the float model, in `unit`; ratios are against it.
        unit: a word, for example "bytes", "bits", "bops", "milliseconds".
        offsets: shape (rows,), at least one: what a row has on top of `constant`; None for a cost that is one sum.

    Raises:
        OptionError: shapes disagree or a value is not finite.
    """

    candidates: tuple[Candidate, ...]
    values: NDArray[np.float64]
    constant: float
    float_cost: float
    unit: str
    offsets: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        rows = () if self.offsets is None else self.offsets.shape
        expected = (*rows, len(self.candidates))
        if self.values.shape != expected or 0 in rows or len(rows) > 1:
            raise OptionError(f"cost values have shape {self.values.shape}, expected {expected} with at least one row")
        numbers = (self.values, self.constant, self.float_cost, 0.0 if self.offsets is None else self.offsets)
        if not all(np.isfinite(number).all() for number in numbers):
            raise OptionError(f"cost table in {self.unit} holds values that are not finite")

    @property
    def rows(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The sums whose largest is the cost: values of shape (rows, n), and what no choice changes, shape (rows,)."""
        offsets = np.zeros(1) if self.offsets is None else self.offsets
        return self.values.reshape(len(offsets), -1), self.constant + offsets

    def of(self, choices: Mapping[str, Choice]) -> float:
        """Return the cost of a plan given as site name -> choice."""
        picked = [choices.get(candidate.site) == candidate.choice for candidate in self.candidates]
        values, constants = self.rows
        return float((constants + values[:, np.asarray(picked, dtype=bool)].sum(axis=1)).max())

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain JSON values, without the candidates."""
        rows = {} if self.offsets is None else {"offsets": self.offsets.tolist()}
        return {
            "values": self.values.tolist(),
            "constant": self.constant,
            "float_cost": self.float_cost,
            "unit": self.unit,
            **rows,
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
            # Files from before there were rows, and costs that are one sum, have none.
            offsets=np.asarray(document["offsets"], dtype=np.float64) if "offsets" in document else None,
        )


@dataclass(frozen=True)
class CostTables:
    """Every cost by name: `size` in bytes, `bits`, `bops`, `activation`, and `latency` where it was measured."""

    tables: dict[str, CostTable]

    def __getitem__(self, name: str) -> CostTable:
        """Return a table.

        Raises:
            OptionError: this cost was not estimated.
        """
        if name not in self.tables:
            raise OptionError(f"cost {name!r} was not estimated; available: {', '.join(self.tables)}")
        return self.tables[name]
