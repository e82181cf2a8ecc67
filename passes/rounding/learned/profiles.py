"""AdaRound, BRECQ, QDrop and PD-Quant as rows of settings of the reconstruction engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from fxquant.core.ir import Program
from fxquant.passes.rounding.learned.asymmetric import with_asymmetric_grids
from fxquant.passes.rounding.learned.engine import reconstruct
from fxquant.passes.rounding.learned.options import Reconstruction
from fxquant.passes.rounding.registry import ROUNDERS, RoundingTask


@dataclass(frozen=True)
class Profile:
    """A learned rounding algorithm.

    Args:
        stages: runs of the engine, one after the other: name in the records -> settings.
        source: where the settings come from.
        asymmetric: whether weights get asymmetric grids first, which no integer backend takes: for simulation only.
    """

    stages: dict[str, Reconstruction]
    source: str
    asymmetric: bool = False


STRAIGHT = Reconstruction(learned="straight_through", drop=0.0, prediction=1.0, prediction_every=4)
"""Values and scales straight through the rounding, the prediction at every fourth step."""

PDQUANT = Reconstruction(prediction=0.1, prediction_where="unsure", correction=100, answer_by_prediction=True)
"""Symmetric weights that deploy, errors normalised, the classifier tuned by the prediction alone.

A tenth is what the prediction makes of the authors' loss in early blocks. With equal shares it learns the calibration
images by heart: ResNet-20 at W2A4 had KL 0.19 on them and 0.59 on others, against 0.24 and 0.47 with a tenth.
"""

PROFILES = {
    "adaround": Profile(
        {"adaround": Reconstruction(unit="layer", inputs="quantized", drop=0.0, step_lr=0.0)},
        "arXiv 2004.10568: up or down learned for each weight, layer by layer; activations stay as calibrated",
    ),
    "brecq": Profile(
        {"brecq": Reconstruction(inputs="quantized", drop=0.0)},
        "arXiv 2102.05426, with the squared error of the block's output, as its authors run it",
    ),
    "qdrop": Profile(
        {"qdrop": Reconstruction()},
        "arXiv 2203.05740: half the elements of each input and each activation inside a block pass unrounded",
    ),
    "pdquant": Profile({"pdquant": PDQUANT}, "arXiv 2212.07048, with weights that deploy"),
    "pdquant-faithful": Profile(
        {
            "pdquant-faithful": Reconstruction(
                iterations=20000,
                rounding_lr=3e-3,
                step_lr=4e-5,
                step_share=False,
                regulariser=0.01,
                prediction=10.0,
                normalise=False,
                correction=500,
                activation_start="quantized",
                guard=False,
            )
        },
        "arXiv 2212.07048 as its authors run it on ResNets: lambda_r = 0.1, lambda_c = 0.02",
        asymmetric=True,
    ),
    "fast": Profile({"fast": replace(STRAIGHT, iterations=3000)}, "LSQ (arXiv 1902.08153) with PD-Quant's prediction"),
    "vit": Profile(
        {"vit": replace(STRAIGHT, feature=1.0)}, "for transformers: penultimate features beside the prediction"
    ),
    "lowbit": Profile(
        {
            "pdquant": PDQUANT,
            "network": Reconstruction(
                unit="network",
                learned="straight_through",
                inputs="quantized",
                drop=0.0,
                prediction=1.0,
                feature=1.0,
                weight_lr=3e-3,
                step_lr=2e-4,
                answer_by_prediction=True,
            ),
        },
        "for two and three bits: pdquant, then the whole network at once against logits and penultimate features",
    ),
}
"""Name of the algorithm -> its settings."""


def run_profile(profile: Profile, task: RoundingTask) -> Program:
    """Return the task's program with the rounding that the profile's stages found one after the other."""
    if profile.asymmetric:
        task = with_asymmetric_grids(task)
    for method, options in profile.stages.items():
        task = replace(task, program=reconstruct(task, options, method))
    return task.program


for _name, _profile in PROFILES.items():
    ROUNDERS.register(_name)(partial(run_profile, _profile))
