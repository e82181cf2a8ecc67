"""`distill`: a plan's weights, biases and steps trained towards the float network's answers (LSQ, arXiv 1902.08153)."""

from __future__ import annotations

from fxquant.core.facts import FakeQuantNodes, Target
from fxquant.core.ir import FakeQuantize, Program, resolve
from fxquant.qat.loop import parameter_groups
from fxquant.qat.trainer import TRAINERS, Trainer, TrainingTask
from fxquant.qat.training_graph import gather, trainable
from fxquant.qat.training_loop import Phase, train


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
    train(task, module, Phase("tune", steps, parameter_groups(module, task.options.weight_lr, task.options.step_lr)))
    return task.program.with_facts(*gather(simulated, module))


_ = TRAINERS.register("distill")(Trainer(distill))
