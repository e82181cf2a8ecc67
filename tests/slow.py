"""Images for `--calibration` that make each run of the scorer take its time, so that a test can kill a worker in it."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from fxquant.passes.sensitivity import Scorer
from tests import small

PAUSE = 0.05
_RUN = Scorer.run


def _slowly(self: Scorer, *args: Any, **kwargs: Any) -> Any:
    time.sleep(PAUSE)
    return _RUN(self, *args, **kwargs)


def images() -> Tensor:
    """Return the images of `tests.small` and slow the scorer down."""
    Scorer.run = _slowly  # type: ignore[method-assign]
    return small.images()
