"""Cost tables: what each candidate costs, as coefficients of an integer program's limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxquant.core.errors import OptionError
from fxquant.core.host import Timing
from fxquant.core.ir import Candidate, Choice


@dataclass(frozen=True)
class Noise:
    """Noise of measured costs; figures are medians over the measurements unless said otherwise.

    Args:
        spread: range of the quartiles of the rounds over their median, at least 0.
        outliers: share of rounds far beyond them, 0..1; the mean.
        waiting: share of the time in which other processes had the core, 0..1.
        error: mean share by which the model misses the networks that it was made from, at least 0.

    Raises:
        OptionError: a figure out of its range.
    """

    spread: float
    outliers: float
    waiting: float
    error: float = 0.0

    def __post_init__(self) -> None:
        if not (self.spread >= 0 and 0 <= self.outliers <= 1 and 0 <= self.waiting <= 1 and self.error >= 0):
            raise OptionError(f"{self} is no noise: shares must lie within 0..1, the others be at least 0")

    @staticmethod
    def of(timings: Sequence[Timing], error: float = 0.0) -> Noise:
        """Return the noise of several timings, at least one."""
        figures = np.array([(t.spread, t.outliers, t.waiting) for t in timings])
        spread, _, waiting = np.median(figures, axis=0).tolist()
        return Noise(spread, float(figures[:, 1].mean()), waiting, error)


@dataclass(frozen=True)
class CostTable:
    """Cost of a plan: `constant + sum of values over the chosen candidates`, or the largest of several such sums.

    A cost with products adds terms of two choices, `x' products x`: converting a value between float and integers.
    A cost with rows, such as the peak of a memory, is `constant + max over rows (offsets + values over the
    chosen)`: no single sum, but a limit on it is one linear limit per row.

    Args:
        candidates: columns, the same order as in the sensitivity matrix.
        values: shape (n,), one cost for each candidate, or (rows, n) with `offsets`, in `unit`.
        constant: cost that no choice changes, in `unit`.
        float_cost: cost of the float model, in `unit`; ratios are against it.
        unit: a word, for example "bytes", "bits", "bops", "milliseconds".
        offsets: shape (rows,), at least one: what a row has on top of `constant`; None for a cost that is one sum.
        products: shape (n, n), symmetric, at least 0, for a cost that is one sum; None where choices only add up.
        noise: of a cost that was measured, None for one that was counted.

    Raises:
        OptionError: shapes disagree or a value is not finite; products that are negative or not symmetric.
    """

    candidates: tuple[Candidate, ...]
    values: NDArray[np.float64]
    constant: float
    float_cost: float
    unit: str
    offsets: NDArray[np.float64] | None = None
    products: NDArray[np.float64] | None = None
    noise: Noise | None = None

    def __post_init__(self) -> None:
        rows = () if self.offsets is None else self.offsets.shape
        expected = (*rows, len(self.candidates))
        if self.values.shape != expected or 0 in rows or len(rows) > 1:
            raise OptionError(f"cost values have shape {self.values.shape}, expected {expected} with at least one row")
        numbers = (self.values, self.constant, self.float_cost, 0.0 if self.offsets is None else self.offsets)
        if not all(np.isfinite(number).all() for number in numbers):
            raise OptionError(f"cost table in {self.unit} holds values that are not finite")
        if self.products is not None:
            square = self.products.shape == (len(self.candidates),) * 2 and self.offsets is None
            if not square or not np.isfinite(self.products).all() or (self.products < 0).any():
                raise OptionError(f"cost products in {self.unit} must be an (n, n) matrix of numbers of at least 0")
            if not np.array_equal(self.products, self.products.T):
                raise OptionError(f"cost products in {self.unit} must be symmetric")

    @property
    def rows(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The sums whose largest is the cost: values of shape (rows, n), and what no choice changes, shape (rows,)."""
        offsets = np.zeros(1) if self.offsets is None else self.offsets
        return self.values.reshape(len(offsets), -1), self.constant + offsets

    def of(self, choices: Mapping[str, Choice]) -> float:
        """Return the cost of a plan given as site name -> choice."""
        picked = [choices.get(candidate.site) == candidate.choice for candidate in self.candidates]
        chosen = np.flatnonzero(picked)
        values, constants = self.rows
        crossing = 0.0 if self.products is None else float(self.products[np.ix_(chosen, chosen)].sum())
        return float((constants + values[:, chosen].sum(axis=1)).max()) + crossing

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain JSON values, without the candidates."""
        rows: dict[str, Any] = {} if self.offsets is None else {"offsets": self.offsets.tolist()}
        if self.products is not None:
            # Sparse: only neighbouring sites have products.
            rows["products"] = [[int(i), int(j), float(self.products[i, j])] for i, j in np.argwhere(self.products)]
        if self.noise is not None:
            rows["noise"] = asdict(self.noise)
        return {
            "values": self.values.tolist(),
            "constant": self.constant,
            "float_cost": self.float_cost,
            "unit": self.unit,
            **rows,
        }

    @staticmethod
    def from_json(document: Mapping[str, Any], candidates: tuple[Candidate, ...]) -> CostTable:
        """Read what `to_json` returned; the candidates come from elsewhere."""
        return CostTable(
            candidates=candidates,
            values=np.asarray(document["values"], dtype=np.float64),
            constant=float(document["constant"]),
            float_cost=float(document["float_cost"]),
            unit=str(document["unit"]),
            # Absent in older files, and for costs that are one sum.
            offsets=np.asarray(document["offsets"], dtype=np.float64) if "offsets" in document else None,
            products=_dense(document["products"], len(candidates)) if "products" in document else None,
            noise=Noise(**document["noise"]) if "noise" in document else None,
        )


def _dense(entries: Iterable[tuple[int, int, float]], count: int) -> NDArray[np.float64]:
    matrix = np.zeros((count, count))
    for i, j, value in entries:
        matrix[i, j] = value
    return matrix


@dataclass(frozen=True)
class CostTables:
    """Every cost by name: `size`, `average_bits`, `bops`, `activation`, and `latency` and `file` where measured."""

    tables: dict[str, CostTable]

    def __getitem__(self, name: str) -> CostTable:
        """Return a table.

        Raises:
            OptionError: this cost was not estimated.
        """
        if name not in self.tables:
            raise OptionError(f"cost {name!r} was not estimated; available: {', '.join(self.tables)}")
        return self.tables[name]
