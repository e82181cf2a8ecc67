"""`distill`: a plan's weights, biases and steps trained towards the float network's answers (LSQ, arXiv 1902.08153).

Where the float network knows its images by heart, the squared error of logits (Ba and Caruana, arXiv 1312.6184) joins
the divergence. ResNet-20 behind Qronos, 768 of its training images, 200 steps, accuracy and KL on test images: at W3A3
90.3 % and .162 with both, 90.1 % and .169 by logits, 89.5 % and .195 by the divergence. MobileNetV2 at W4A4, which is
unsure of its images: KL 1.83 by logits, 1.33 by the divergence.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fxquant.core.facts import FakeQuantNodes, Target
from fxquant.core.ir import FakeQuantize, Program, resolve
from fxquant.core.run import CERTAIN, LOSSES, answer_graph, model_outputs
from fxquant.qat.loop import parameter_groups
from fxquant.qat.trainer import TRAINERS, Trainer, TrainingTask
from fxquant.qat.training_graph import gather, trainable
from fxquant.qat.training_loop import Objective, Phase, train

LOGITS = 5.0
"""Weight of `|answer - reference|^2 / |reference|^2` of a batch beside the loss.

ResNet-20 at W3A3, one seed: KL .217 on test images with 1, .162 with 5, .169 without the loss; the judge, which sees
mixed images, rejects training by logits alone at W2A2.
"""
ASKED = 256
"""Images, at most, by which a network's certainty is told."""


def distill(task: TrainingTask) -> Program:
    """Return the task's program with trained weights, biases and steps; its plan stays."""
    return tuned(task, task.options.steps)


def tuned(task: TrainingTask, steps: int) -> Program:
    """Return the task's program after this many steps of ordinary training, straight-through weights and learned steps.

    On a target with one step for all channels of a weight, the steps of weights stay as they are.
    """
    simulated = task.simulated
    module = trainable(simulated)
    if not task.program[Target].per_channel:
        # Each channel would learn a step of its own.
        for name in (name for names in simulated[FakeQuantNodes].weights.values() for name in names):
            quantizer = module.get_submodule(str(resolve(module.graph, name).target))
            assert isinstance(quantizer, FakeQuantize)
            quantizer.learn(on=False)
    groups = parameter_groups(module, task.options.weight_lr, task.options.step_lr)
    objective, note = aim(task)
    train(task, module, Phase("tune", steps, groups, objective=objective))
    rounding, values = gather(simulated, module)
    return task.program.with_facts(replace(rounding, notes=(*rounding.notes, *note)), values)


def aim(task: TrainingTask) -> tuple[Objective | None, tuple[str, ...]]:
    """Return what a plan is trained for, None for the task's loss, and a note where that was not asked for by name."""
    loss, towards, notes = task.loss, task.options.towards, tuple[str, ...]()
    if towards == "auto":
        certainty = None if loss.needs_labels else _certainty(task)
        if certainty is None or certainty < CERTAIN:
            return None, ()
        notes = (
            f"trained towards the float network's logits too: it gives its images' likeliest class {certainty:.2f} on "
            "average, so that probabilities say little more than the class",
        )
    if towards == "loss":
        return None, ()

    def both(reference: Tensor, answer: Tensor, labels: Tensor | None) -> Tensor:
        logits = LOSSES["mse"].soften(reference, answer, 1.0)
        return loss(reference, answer, labels).mean() + LOGITS * logits

    return both, notes


def _certainty(task: TrainingTask) -> float | None:
    few = task.images.slice(0, ASKED)
    return task.loss.certainty(model_outputs(answer_graph(task.program.module), few.inputs))


_ = TRAINERS.register("distill")(Trainer(distill))
