"""The loop of all trainers: distillation steps with a penalty, a falling rate, and a state that survives a kill."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.optim import Adam

from fxquant.core.errors import FailureError
from fxquant.core.ir import gradients
from fxquant.core.run import CalibrationSet, answer_graph, first_tensor, moved
from fxquant.core.storage import Arrays
from fxquant.qat.trainer import TrainingTask

KEPT_EVERY = 25
"""Steps between two states that are kept."""
STREAM = 1_000_003
"""Distance of the seeds of two runs: each step has a seed of its own, so that a resumed run draws alike."""


Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(float answers, answers, labels or None) -> what is minimised, shape ()."""


def _no_penalty(step: int) -> Tensor | None:
    del step
    return None


def _nothing(step: int, optimizer: Adam) -> None:
    del step, optimizer


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Args:
        name: in progress, and of its state in the store.
        steps: how many.
        groups: parameter groups of the optimizer, each with its rate at the start.
        penalty: step -> what is added to the loss, or None.
        after: called after each step, may change parameters.
        objective: what is minimised; None for the mean of the task's loss.
    """

    name: str
    steps: int
    groups: list[dict[str, Any]]
    penalty: Callable[[int], Tensor | None] = _no_penalty
    after: Callable[[int, Adam], None] = _nothing
    objective: Objective | None = None


def train(task: TrainingTask, module: GraphModule, phase: Phase) -> None:
    """Train a module in place: towards the float network's answers, or labels where the loss compares with such.

    `L = objective(float answer, answer) + penalty`, Adam, all rates times `(1 + cos(pi step / steps)) / 2`.

    Args:
        task: with images, loss and store.
        module: from `trainable`, whose quantizers may have been replaced; everything that changes is in its state.
        phase: what to do.

    Raises:
        FailureError: the loss is not finite.
        FileFormatError: the store holds states of another training.
    """
    teacher, student = answer_graph(task.program.module), answer_graph(module)
    optimizer = Adam(phase.groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    known = task.store.get(phase.name)
    done = 0 if known is None else _restored(module, optimizer, known)
    with gradients():
        for step in task.reporter.track(range(done, phase.steps), f"train: {phase.name}", phase.steps - done):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / phase.steps)) / 2
            batch = drawn(task, phase.name, step)
            with torch.no_grad():
                reference = first_tensor(teacher(*batch.inputs))
            answer = first_tensor(student(*batch.inputs))
            if phase.objective is None:
                value = task.loss(reference, answer, batch.labels).mean()
            else:
                value = phase.objective(reference, answer, batch.labels)
            extra = phase.penalty(step)
            value = value if extra is None else value + extra
            if not math.isfinite(float(value.detach())):
                raise FailureError(f"the loss is {float(value.detach())}; train again with lower rates")
            optimizer.zero_grad()
            torch.autograd.backward(value)
            optimizer.step()
            phase.after(step, optimizer)
            if (step + 1) % KEPT_EVERY == 0 or step + 1 == phase.steps:
                _ = task.store.put(phase.name, _state(module, optimizer, step + 1))


def drawn(task: TrainingTask, phase: str, step: int) -> CalibrationSet:
    """Return the images of a step, the same whether a run was resumed or not."""
    seed = (task.seed * STREAM + step) * 2 + sum(map(ord, phase)) * STREAM**2
    generator = torch.Generator().manual_seed(seed % 2**63)
    batch = task.images.take(torch.randint(len(task.images), (task.options.batch,), generator=generator).tolist())
    if not task.options.moving:
        return batch
    turned = tuple(moved(t, seed % 2**63) if t.is_floating_point() else t for t in batch.inputs)
    return CalibrationSet(turned, batch.labels)


def _state(module: GraphModule, optimizer: Adam, step: int) -> Arrays:
    arrays: Arrays = {"step": np.array(step)}
    for name, tensor in module.state_dict().items():
        arrays[f"module:{name}"] = tensor.detach().cpu().numpy()
    for position, values in optimizer.state_dict()["state"].items():
        for name, tensor in values.items():
            arrays[f"adam:{position}:{name}"] = tensor.cpu().numpy()
    return arrays


def _restored(module: GraphModule, optimizer: Adam, arrays: Arrays) -> int:
    """Put a state back and return how many steps it had seen."""
    moments: dict[int, dict[str, Tensor]] = {}
    state = module.state_dict()
    with torch.no_grad():
        for key, array in arrays.items():
            kind, _, name = key.partition(":")
            value = torch.from_numpy(np.array(array))
            if kind == "module":
                _ = state[name].copy_(value)
            elif kind == "adam":
                position, _, field = name.partition(":")
                moments.setdefault(int(position), {})[field] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(arrays["step"])
