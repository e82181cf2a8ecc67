"""Whether the prediction difference has anything to say: how sure a network is of the images it is tuned on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from fxquant.core.run import Loss
from fxquant.passes.rounding.learned.options import Reconstruction

CERTAIN = 0.9
"""Mean probability of the likeliest class from which on a network counts as knowing its images by heart.

On their training images ResNet-20 has .994 and ResNet-8 .93; ImageNet networks have .52 to .77 (MobileNets, DeiT-tiny,
SqueezeNet). With ResNet-20 prediction and correction take 2.7 times the time and bring nothing: at W2A2 73.6 % without,
73.5 % with weight .1, 57.2 % with 1; at W3A3 KL .233, .230 and .299 (1024 images, 200 steps).
"""


def where_it_pays(
    options: Reconstruction, given: Iterable[str], loss: Loss, answers: Tensor
) -> tuple[Reconstruction, str]:
    """Return the settings, without prediction and correction where the network is certain of its images, and a note.

    Args:
        options: settings of the engine.
        given: names of those that the user gave.
        loss: compares answers; where no class excludes others, there is no certainty.
        answers: of the float network on the images that are tuned on.
    """
    asked = options.prediction_where == "unsure" and options.prediction and "prediction" not in given
    certainty = loss.certainty(answers) if asked else None
    if certainty is None:
        return options, ""
    found = f"the network gives its calibration images' likeliest class {certainty:.2f} on average"
    if certainty < CERTAIN:
        return options, f"the prediction difference is used: {found}, less than {CERTAIN:g}"
    without = replace(options, prediction=0.0, correction=0, answer_by_prediction=False)
    return without, f"the prediction difference is left out: {found}, so that predictions would be learned by heart"
