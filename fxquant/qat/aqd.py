"""`aqd`: whole detectors quantized, batch norms of each level kept apart (AQD, arXiv 2007.06919).

Every layer of backbone, neck and heads is quantized, with learned steps, and trained towards all outputs of the float
detector. Where levels share a head, its batch norms keep statistics of each level: quantized features of different
levels have different moments, and one set of statistics fits none of them (section 3.3). They become separate when the
graph is prepared (`Trainer.separates`), move by what quantization changes at their level, and are trained apart. (The
paper takes those of each level as they are, for it trains the float detector like that, too.)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fxquant.core.facts import Rounding, rules
from fxquant.core.ir import Program
from fxquant.qat.distill import tuned
from fxquant.qat.loop import reestimate
from fxquant.qat.trainer import TRAINERS, Trainer, Training, TrainingTask
from fxquant.qat.training_graph import gather, trainable


@dataclass(frozen=True)
class DetectorTraining(Training):
    """How detectors are trained; all else as for every training.

    Args:
        norm_images: images from which statistics of batch norms are found before training.

    Raises:
        OptionError: a value out of range.
    """

    norm_images: int = field(default=64, metadata=rules(least=2))


NO_NORM = "aqd: no batch norm is left to keep apart by level; all of them were folded into their layers"


def aqd(task: TrainingTask) -> Program:
    """Return the task's program trained; its plan stays."""
    options = task.options
    assert isinstance(options, DetectorTraining)
    simulated = task.simulated
    module = trainable(simulated)
    shown = task.images.slice(0, options.norm_images)
    norms = reestimate(module, shown, options.batch, reference=task.program.module)
    if norms:
        found, values = gather(simulated, module)
        task = replace(task, program=task.program.with_facts(found, values))
    done = tuned(task, options.steps)
    known = done[Rounding]
    note = f"aqd: {norms} batch norms with statistics of the quantized network" if norms else NO_NORM
    return done.with_facts(replace(known, notes=(*known.notes, note)))


_ = TRAINERS.register("aqd")(Trainer(aqd, DetectorTraining, separates=True))
