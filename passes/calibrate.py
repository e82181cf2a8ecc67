"""Run calibration images through the graph with observers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fxquant.core.errors import CalibrationError, first_line
from fxquant.core.host import SILENT, Reporter, is_shortage
from fxquant.core.ir import Program
from fxquant.core.run import CalibrationSet, Runner, first_tensor, live_bytes
from fxquant.passes.base import Pass

WORKING_LIMIT = 2 * 10**8
"""Bytes of values that a forward pass holds at once, for as long as one image takes no more."""


@dataclass(frozen=True)
class Calibrate(Pass):
    """Fill the observers; the graph stays as it is.

    Args:
        images: calibration images.
        batch: images for each forward pass at most; fewer where their values would take more than `WORKING_LIMIT`.
        reporter: shows progress.

    Raises:
        CalibrationError: the graph does not run on these images, or a value is not finite.
    """

    images: CalibrationSet = field(repr=False)
    batch: int = 32
    reporter: Reporter = field(default=SILENT, repr=False)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program, its observers filled."""
        batch = max(1, min(self.batch, WORKING_LIMIT // max(1, live_bytes(program.module.graph))))
        total, runner = -(-len(self.images) // batch), Runner(program.module)
        last = runner.nodes[-1]
        with torch.no_grad():
            for part in self.reporter.track(self.images.batches(batch), "calibrate", total):
                try:
                    values = runner.given(part.inputs)
                    # A kernel that clips along would take what is no number for one.
                    runner.run(runner.steps, values, keep=lambda node: node is last, alone=runner.clips)
                    answer = first_tensor(values[last])
                except (RuntimeError, TypeError, ValueError, IndexError) as error:
                    if is_shortage(error):
                        raise
                    shapes = [tuple(t.shape) for t in part.inputs]
                    raise CalibrationError(
                        f"the model does not run on images of shape {shapes}: {first_line(error)}"
                    ) from error
                if answer.is_floating_point() and not torch.isfinite(answer).all():
                    raise CalibrationError(
                        "the answer of the model is not finite on calibration images, though images and weights are; "
                        "look for an overflow, a logarithm or a division in its last ops"
                    )
        return program, 0
