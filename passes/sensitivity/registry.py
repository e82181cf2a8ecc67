"""The table of estimators, and what each of them declares: where it is defined, its unit, what it measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fxquant.core.errors import OptionError
from fxquant.core.facts import SensitivityMatrix
from fxquant.core.registry import Registry
from fxquant.core.run import VALUES_ONLY
from fxquant.passes.sensitivity.scorer import Scorer, standard_error


@dataclass(frozen=True)
class Estimate:
    """What an estimator found on the m columns of a scorer.

    Args:
        values: shape (m, m), symmetric.
        stderr: shape (m, m), standard errors; NaN where they are not known.
        evaluations: whole-network passes over one image spent.
        notes: figures about its own work, by name.
        constant: value of the context in the estimator's unit; None for the context's loss.
    """

    values: NDArray[np.float64]
    stderr: NDArray[np.float64]
    evaluations: float
    notes: Mapping[str, float] = field(default_factory=dict)
    constant: float | None = None

    @staticmethod
    def diagonal(samples: NDArray[np.float64], evaluations: float, **notes: float) -> Estimate:
        """Return the diagonal matrix of the means of samples, with the standard errors of the means.

        Args:
            samples: shape (m, samples), for example one for each image.
            evaluations: whole-network passes over one image spent.
            notes: figures about its own work, by name.
        """
        return Estimate(np.diag(samples.mean(axis=1)), np.diag(standard_error(samples)), evaluations, notes)


Measure = Callable[[Scorer], Estimate]

Sweep = Literal["batches", "pairs", "own"]


@dataclass(frozen=True)
class Estimator:
    """A registered estimator; the contract test holds it to what it declares.

    Args:
        name: in `ESTIMATORS`.
        measure: measures what it needs with the scorer.
        float_only: it is defined around the float network only, and refuses a plan as context.
        unit: unit of its values; None for the loss's own.
        has_pairs: entries between two sites may differ from 0.
        measured: its diagonal holds the measured loss of each substitution.
        curvature: it needs the curvature of the loss, of which a function says nothing.
        work: what it measures: "batches", one cell for each by `Scorer.by_batch`; "pairs", all pairs of columns as
            well; or what only itself knows, its "own".
        images: it runs the network, and its standard errors are over images: unknown for a single one.
    """

    name: str
    measure: Measure
    float_only: bool = False
    unit: str | None = None
    has_pairs: bool = False
    measured: bool = False
    images: bool = True
    curvature: bool = False
    work: Sweep = "batches"

    def __call__(self, scorer: Scorer) -> SensitivityMatrix:
        """Return the candidates' matrix: `spread values spread'` of what was found on the columns.

        Raises:
            OptionError: the scorer has a context, and the estimator is defined around the float network only; or it
                needs the curvature of a loss that is a function.
        """
        if self.curvature and not scorer.loss.curved:
            raise OptionError(f"{self.name}: {VALUES_ONLY.format(loss=scorer.loss.name)}")
        if self.float_only and scorer.context is not None:
            raise OptionError(
                f"estimator {self.name!r} is defined around the float network only; "
                "score without a context, or use an estimator that measures, for example 'gram'"
            )
        found, share = self.measure(scorer), scorer.spread
        gathered = share @ ((found.values + found.values.T) / 2) @ share.T
        variance = share**2 @ np.nan_to_num(found.stderr) ** 2 @ (share**2).T
        # One unknown standard error makes the sum's unknown.
        unknown = share @ np.isnan(found.stderr) @ share.T > 0
        return SensitivityMatrix(
            scorer.candidates,
            (gathered + gathered.T) / 2,
            np.where(unknown, np.nan, np.sqrt(variance)),
            self.name,
            found.evaluations,
            scorer.loss.unit if self.unit is None else self.unit,
            scorer.context_loss if found.constant is None else found.constant,
            found.notes,
        )


ESTIMATORS: Registry[Estimator] = Registry("estimator")
"""Name -> estimator."""


def estimator(
    name: str,
    *,
    float_only: bool = False,
    unit: str | None = None,
    has_pairs: bool = False,
    measured: bool = False,
    images: bool = True,
    curvature: bool = False,
    work: Sweep = "batches",
) -> Callable[[Measure], Measure]:
    """Decorate a function that measures: register it under a name with what it declares; see `Estimator`.

    Raises:
        PipelineError: the name is taken.
    """

    def register(measure: Measure) -> Measure:
        _ = ESTIMATORS.register(name)(
            Estimator(name, measure, float_only, unit, has_pairs, measured, images, curvature, work)
        )
        return measure

    return register
