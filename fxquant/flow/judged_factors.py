"""Equalize channels as far as the measured loss of plans falls."""

from __future__ import annotations

from fxquant.core.facts import ChannelScales
from fxquant.core.ir import Program
from fxquant.core.run import CalibrationSet
from fxquant.flow.judged_plans import affordable, compared, judged_plans, log_loss
from fxquant.passes import EqualizeChannels, scaled

SHARES = (1.0, 0.5)
"""Powers of the factors that are tried, beside none of them."""
GAIN = 0.1
"""How far the sum of the logarithms of losses must fall: on MobileNetV2 a fall of .07 was none on other images."""


def equalize(program: Program, images: CalibrationSet) -> Program:
    """Return the program with its channels scaled by the power of their factors that loses least, if by enough.

    A model of rounding noise proposes factors; the losses of uniform plans with weights rounded to nearest decide.

    Args:
        program: from `prepare`, its observers empty.
        images: calibration images.
    """
    count = affordable(program)
    # Twice as many tell the noise.
    proposed = EqualizeChannels(images.slice(0, 2 * count))(program)
    scales = proposed[ChannelScales]
    if not scales.paths:
        return proposed
    few = images.slice(0, count)
    tried = {0.0: scaled(program, ChannelScales())} | {share: scaled(program, scales.power(share)) for share in SHARES}
    plans, on = judged_plans(program), compared(program, few)
    losses = {share: log_loss(each, few, plans, on) for share, each in tried.items()}
    found = min(losses, key=losses.__getitem__)
    best = tried[found if losses[found] < losses[0.0] - GAIN else 0.0]
    return Program(best.module, best.facts, proposed.log)
