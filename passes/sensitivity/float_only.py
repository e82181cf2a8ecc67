"""Baselines that are defined around the float network only: what they say to a plan as context."""

from __future__ import annotations

from fxquant.core.errors import OptionError
from fxquant.passes.sensitivity.scorer import Scorer


def refuse_context(scorer: Scorer, estimator: str) -> None:
    """Raise if everything else is quantized by a plan.

    Raises:
        OptionError: the scorer has a context.
    """
    if scorer.context is not None:
        raise OptionError(
            f"estimator {estimator!r} is defined around the float network only; "
            "score without a context, or use an estimator that measures, for example 'gram'"
        )
