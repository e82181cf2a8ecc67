"""Leave the first and the last layers of a network that returns an image in float where that pays.

Its answer is compared value by value, so that the rounding of the last layer's input is seen as it is; and all that
the body adds to the first layer's output reads that layer's rounding. Both layers have little work.
"""

from __future__ import annotations

from dataclasses import replace
from math import exp

from fxquant.core.facts import ChannelScales, Settings, found, site_types
from fxquant.core.host import Reporter
from fxquant.core.ir import Program, Sites, end_sites, shape_of
from fxquant.core.run import LOSSES, CalibrationSet, find_answers, placeholders
from fxquant.flow.judged_plans import affordable, compared, judged_plans, log_loss
from fxquant.flow.pipeline import find_sites
from fxquant.flow.score import loss_in_use
from fxquant.passes import scaled

WORK = 0.05
"""Share of all multiply-accumulates that the layers may have: so much time may run at the speed of float."""
GAIN = 0.2
"""How far the logarithm of the loss must fall."""
SAID = "{names}, the first and last layers, stay in float: then the loss at the widest precision is {share:.0%}"


def with_float_ends(captured: Program, settings: Settings, images: CalibrationSet, reporter: Reporter) -> Settings:
    """Return settings that say whether the first and the last layers stay in float, measured where that may pay.

    Measured are the widest uniform plans, with weights rounded to nearest, on calibration images.

    Args:
        captured: the graph.
        settings: of the run; `float_ends` decides unless it is "measured".
        images: calibration images.
        reporter: says what is found.
    """
    if settings.float_ends != "measured" or settings.recipe is not None:
        return settings
    program = find_sites(captured, settings)
    if not _may_pay(program, images):
        return settings
    few = images.slice(0, affordable(program))
    kept = replace(settings, float_ends="always")
    tried = [scaled(each, ChannelScales()) for each in (program, find_sites(captured, kept))]
    on = compared(program, few)
    quantized, floating = (log_loss(each, few, judged_plans(each)[-1:], on) for each in tried)
    if floating >= quantized - GAIN:
        return replace(settings, float_ends="never")
    names = ", ".join(end_sites(program.module.graph, program[Sites].sites))
    reporter.say(SAID.format(names=names, share=exp(floating - quantized)))
    return kept


def _may_pay(program: Program, images: CalibrationSet) -> bool:
    """Whether the model returns an image, and the layers have little work and no pin."""
    graph, sites, settings = program.module.graph, program[Sites].sites, program[Settings]
    ends, types = end_sites(graph, sites), site_types(graph, sites)
    work = sum(site.macs for site in sites if site.name in ends) / max(1, sum(site.macs for site in sites))
    pinned = settings.pin_ends or any(found(pattern, ends, types) for pattern in settings.pins)
    return bool(ends) and work <= WORK and not pinned and _returns_image(program, images)


def _returns_image(program: Program, images: CalibrationSet) -> bool:
    """Whether the answer is compared by its values and is as high and wide as the input, or a multiple of that."""
    graph = program.module.graph
    answers = find_answers(graph)
    if len(answers) != 1 or loss_in_use(program, images) is not LOSSES["mse"]:
        return False
    answer, inputs = shape_of(answers[0].node), [shape_of(node) for node in placeholders(graph)]
    if len(answer) != 4:
        return False
    sides = [zip(answer[2:], shape[2:], strict=True) for shape in inputs if len(shape) == 4]
    return any(all(made >= given and made % given == 0 for made, given in pairs) for pairs in sides)
