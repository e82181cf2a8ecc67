"""Sensitivity: how the precision of each site, and of each pair of sites, changes the loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.host import card, printable, table, tiles
from fxquant.core.ir import Candidate, Choice
from fxquant.core.storage import checked_document, parse_json, read_arrays, write_arrays

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SensitivityMatrix:
    """Quadratic model of the loss: `loss(plan) = constant + x' values x` with x one-hot per site.

    The diagonal holds the loss of one substitution, each off-diagonal half of the pair's interaction
    (`values[i, j] + values[j, i] = loss(i and j) - loss(i) - loss(j)`); entries between two choices of one site never
    count. Losses are counted from the plan that everything else was quantized by (the context): `constant` is its own
    loss, and the candidates it consists of have rows of 0. In the float context `constant` is 0.

    Args:
        candidates: the n columns, grouped by site.
        values: shape (n, n), symmetric float64, in `unit`.
        stderr: shape (n, n), standard error of `values` over the images; NaN where it is not known.
        estimator: name of the estimator.
        evaluations: forward passes over one image spent, in units of whole-network passes.
        unit: name of the loss, for example "KL nats".
        constant: loss of the context, in `unit`.
        notes: figures of the estimator about its own work, by name.

    Raises:
        OptionError: wrong shapes, not symmetric, or not finite.
    """

    candidates: tuple[Candidate, ...]
    values: NDArray[np.float64]
    stderr: NDArray[np.float64]
    estimator: str
    evaluations: float
    unit: str
    constant: float = 0.0
    notes: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.candidates), len(self.candidates))
        if self.values.shape != shape or self.stderr.shape != shape:
            raise OptionError(
                f"sensitivity arrays have shape {self.values.shape} and {self.stderr.shape}, expected {shape}"
            )
        if not np.isfinite(self.values).all() or not np.isfinite(self.constant):
            raise OptionError(
                f"sensitivity of estimator {self.estimator!r} is not finite; check the calibration images"
            )
        if not np.array_equal(self.values, self.values.T):
            raise OptionError(f"sensitivity of estimator {self.estimator!r} is not symmetric")

    def __repr__(self) -> str:
        size = f"{len(self.candidates)} candidates of {len(self.sites)} layers"
        return printable(f"SensitivityMatrix({self.estimator}: {size}, {self.unit}, {self.evaluations:.4g} passes)")

    def _repr_html_(self) -> str:
        """Return each layer's loss alone by precision; pairs are in the report."""
        labels = sorted({c.choice for c in self.candidates})
        alone = {(c.site, c.choice): f"{self.values[k, k]:.3g}" for k, c in enumerate(self.candidates)}
        rows = [(site, *(alone.get((site, label), "") for label in labels)) for site in self.sites]
        numbers = [
            ("Estimator", self.estimator, self.unit),
            ("Candidates", str(len(self.candidates)), f"of {len(self.sites)} layers"),
            ("Spent", f"{self.evaluations:.4g}", "passes of one image"),
        ]
        columns = ("loss alone", *(choice.label for choice in labels))
        return card("fxquant sensitivity", tiles(numbers), table(columns, rows))

    @property
    def sites(self) -> tuple[str, ...]:
        """Site names in the order of the columns."""
        return tuple(dict.fromkeys(candidate.site for candidate in self.candidates))

    @property
    def groups(self) -> list[NDArray[np.intp]]:
        """Column indices of each site."""
        names = np.array([candidate.site for candidate in self.candidates])
        return [np.flatnonzero(names == site) for site in self.sites]

    def predict(self, choices: Mapping[str, Choice]) -> float:
        """Return the modelled loss of a plan given as site name -> choice."""
        x = np.array([choices.get(c.site) == c.choice for c in self.candidates], dtype=np.float64)
        return self.constant + float(x @ self.values @ x)

    def rescaled(self, ratios: Mapping[str, float]) -> SensitivityMatrix:
        """Return `diag(sqrt r) values diag(sqrt r)`: each site's own loss times its ratio, pairs in between.

        Args:
            ratios: site name -> ratio >= 0; a site that is not named keeps its loss.
        """
        root = np.sqrt([ratios.get(candidate.site, 1.0) for candidate in self.candidates])
        scaled = np.outer(root, root)
        return replace(self, values=self.values * scaled, stderr=self.stderr * scaled)

    def save(self, path: Path) -> None:
        """Write the matrix as npz.

        Raises:
            OutputError: the folder cannot be written.
        """
        header = {
            "kind": "sensitivity",
            "version": FORMAT_VERSION,
            "candidates": [[c.site, c.choice.label] for c in self.candidates],
            "estimator": self.estimator,
            "evaluations": self.evaluations,
            "unit": self.unit,
            "constant": self.constant,
            "notes": {name: float(value) for name, value in self.notes.items()},
        }
        write_arrays(path, {"values": self.values, "stderr": self.stderr, "header": np.array(json.dumps(header))})

    @staticmethod
    def load(path: Path) -> SensitivityMatrix:
        """Read what `save` wrote.

        Raises:
            FileFormatError: missing, truncated, of another version or inconsistent.
        """
        arrays = read_arrays(path)
        try:
            header: dict[str, Any] = checked_document(
                parse_json(str(arrays["header"])), "sensitivity", FORMAT_VERSION, str(path)
            )
            return SensitivityMatrix(
                candidates=tuple(Candidate(site, Choice.parse(label)) for site, label in header["candidates"]),
                values=arrays["values"].astype(np.float64, casting="same_kind"),
                stderr=arrays["stderr"].astype(np.float64, casting="same_kind"),
                estimator=str(header["estimator"]),
                evaluations=float(header["evaluations"]),
                unit=str(header["unit"]),
                constant=float(header.get("constant", 0.0)),
                notes={str(name): float(value) for name, value in header.get("notes", {}).items()},
            )
        except (KeyError, ValueError, TypeError, AttributeError, OptionError) as error:
            raise FileFormatError(
                f"{path} is not an intact sensitivity file ({error}); run the analysis again"
            ) from error


@dataclass(frozen=True)
class Surrogates:
    """Every measured matrix by estimator; the first is the preferred one."""

    matrices: Mapping[str, SensitivityMatrix]
