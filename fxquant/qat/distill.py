"""`distill`: a plan's weights, biases and steps trained towards the float network's answers (LSQ, arXiv 1902.08153).

The squared error of logits (Ba and Caruana, arXiv 1312.6184) may join the loss: few images that the network knows by
heart tell little by their probabilities. ResNet-20 behind Qronos, 768 of its training images, 200 steps at one absolute
rate: W2A2 78.4 % by logits alone and 75.5 % by the loss, with codebooks 81.0 and 77.3 %. With 7664 images and
activations at 8 bits they do harm: KL on test images .033 by the loss and, at a third of the rate, .074 with logits at
3 bits on average (.036 by the loss); .113 and .153 at 2.5.
"""

from __future__ import annotations

from torch import Tensor

from fxquant.core.facts import FakeQuantNodes, Target
from fxquant.core.ir import FakeQuantize, Program, resolve
from fxquant.core.run import LOSSES
from fxquant.qat.loop import parameter_groups
from fxquant.qat.trainer import TRAINERS, Trainer, TrainingTask
from fxquant.qat.training_graph import gather, trainable
from fxquant.qat.training_loop import Objective, Phase, train

LOGITS = 5.0
"""Weight of `|answer - reference|^2 / |reference|^2` of a batch beside the loss; W3A3: KL .217 with 1, .162 with 5."""


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
    train(task, module, Phase("tune", steps, groups, objective=aim(task)))
    return task.program.with_facts(*gather(simulated, module))


def aim(task: TrainingTask) -> Objective | None:
    """Return what a plan is trained for, None for the task's loss."""
    if task.options.towards == "loss":
        return None

    def both(reference: Tensor, answer: Tensor, labels: Tensor | None) -> Tensor:
        logits = LOSSES["mse"].soften(reference, answer, 1.0)
        return task.loss(reference, answer, labels).mean() + LOGITS * logits

    return both


_ = TRAINERS.register("distill")(Trainer(distill))
