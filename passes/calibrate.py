"""Run calibration images through the graph with observers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fxquant.core.data import CalibrationSet
from fxquant.core.errors import CalibrationError
from fxquant.core.memory import is_shortage
from fxquant.core.program import Program
from fxquant.core.progress import SILENT, Reporter
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class Calibrate(Pass):
    """Fill the observers; the graph stays as it is.

    Args:
        images: calibration images.
        batch: images for each forward pass.
        reporter: shows progress.

    Raises:
        CalibrationError: the graph does not run on these images, or a value is not finite.
    """

    images: CalibrationSet = field(repr=False)
    batch: int = 32
    reporter: Reporter = field(default=SILENT, repr=False)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program, its observers filled."""
        total = -(-len(self.images) // self.batch)
        with torch.no_grad():
            for part in self.reporter.track(self.images.batches(self.batch), "calibrate", total):
                try:
                    program.module(*part.inputs)
                except (RuntimeError, TypeError, ValueError, IndexError) as error:
                    if is_shortage(error):
                        raise
                    shapes = [tuple(t.shape) for t in part.inputs]
                    first = (str(error).splitlines() or [type(error).__name__])[0][:200]
                    raise CalibrationError(f"the model does not run on images of shape {shapes}: {first}") from error
        return program, 0
