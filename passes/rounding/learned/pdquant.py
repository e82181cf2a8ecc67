"""PD-Quant (arXiv 2212.07048): QDrop with the difference of the network's prediction, and corrected inputs."""

from __future__ import annotations

from dataclasses import replace

from fxquant.core.ir import Program
from fxquant.passes.rounding.learned.engine import reconstruct
from fxquant.passes.rounding.learned.options import Reconstruction
from fxquant.passes.rounding.registry import ROUNDERS, RoundingTask

FAITHFUL = Reconstruction(
    unit="block",
    iterations=20000,
    rounding_lr=3e-3,
    step_lr=4e-5,
    step_share=False,
    regulariser=0.01,
    prediction=10.0,
    temperature=4.0,
    normalise=False,
    correction=500,
    needs_correction=True,
    asymmetric=True,
    guard=False,
)
"""As the authors run it on ResNets: `lambda_r = 0.1`, `lambda_c = 0.02`, asymmetric weights that no kernel takes."""

PDQUANT = Reconstruction(
    unit="block", prediction=0.1, temperature=4.0, correction=100, answer_by_prediction=True, guard=True
)
"""The default: symmetric weights that deploy, errors normalised, the classifier tuned by the prediction alone.

A tenth is what the prediction makes of the authors' loss in early blocks. With equal shares it learns the calibration
images by heart: ResNet-20 at W2A4 had KL 0.19 on them and 0.59 on others, against 0.24 and 0.47 with a tenth.
"""

FAST = Reconstruction(
    unit="block", iterations=3000, learned="straight_through", drop=0.0, prediction=1.0, prediction_every=4
)
"""Values and scales straight through, the prediction at every fourth step, inputs as they are."""

SECOND_STAGE = Reconstruction(
    unit="network",
    learned="straight_through",
    inputs="quantized",
    drop=0.0,
    prediction=1.0,
    feature=1.0,
    weight_lr=3e-3,
    step_lr=2e-4,
    answer_by_prediction=True,
)
"""The whole network at once, against logits and penultimate features."""

VIT = Reconstruction(
    unit="block", learned="straight_through", drop=0.0, prediction=1.0, feature=1.0, prediction_every=4
)
"""For transformers: halves of blocks, with the penultimate features beside the prediction."""


@ROUNDERS.register("pdquant-faithful")
def pdquant_faithful(task: RoundingTask) -> Program:
    """Run PD-Quant to the letter: for comparison in simulation."""
    return reconstruct(task, FAITHFUL, "pdquant-faithful")


@ROUNDERS.register("pdquant")
def pdquant(task: RoundingTask) -> Program:
    """Learn rounding directions and steps against unit outputs and the network's prediction."""
    return reconstruct(task, PDQUANT, "pdquant")


@ROUNDERS.register("fast")
def fast(task: RoundingTask) -> Program:
    """Learn values, scales and steps straight through the rounding, in a fraction of the time."""
    return reconstruct(task, FAST, "fast")


@ROUNDERS.register("lowbit")
def lowbit(task: RoundingTask) -> Program:
    """Run `pdquant`, then tune the whole network at once: for two and three bits."""
    return reconstruct(replace(task, program=pdquant(task)), SECOND_STAGE, "network")


@ROUNDERS.register("vit")
def vit(task: RoundingTask) -> Program:
    """Learn values, scales and steps of a transformer against features and prediction."""
    return reconstruct(task, VIT, "vit")
