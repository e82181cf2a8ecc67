"""Helpers for a training loop: parameter groups, a distillation step, re-estimated batch-norm statistics.

    module = result.trainable()
    optimizer = torch.optim.Adam(parameter_groups(module, weight_lr=3e-3, step_lr=1e-3))
    for images in batches:
        distill_step(module, result.program.module, images, optimizer)
    result = result.with_trained(module)

Batch norms that can be folded are folded before quantizers are inserted: the trained weights are those of the kernels,
and there are no statistics to drift. A batch norm that is left runs on its stored statistics, in train mode too;
`reestimate` computes them again after training has changed its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.optim import Optimizer

from fxquant.core.errors import CalibrationError, FailureError, OptionError
from fxquant.core.ir import FakeQuantize, is_constant, put_tensor
from fxquant.core.run import (
    Loss,
    LossFunction,
    Runner,
    answer_graph,
    answer_loss,
    collect,
    first_tensor,
    loss_of,
    placeholders,
)

STATISTICS = ("running_mean", "running_var")


def parameter_groups(module: nn.Module, weight_lr: float, step_lr: float) -> list[dict[str, Any]]:
    """Return groups for a PyTorch optimizer, one for each parameter, all at rates relative to their values.

    Values range over orders of magnitude: steps from 8-bit weights to 2-bit activations, weights with the batch norms
    that were folded into them. A step gets `step_lr * mean(scale)`, every other tensor `weight_lr` times its root mean
    square, so that an update of Adam, whose size is about the rate, changes each by about the same share. A tensor of
    zeros is taken to be as large as the median one. Steps have no weight decay.

    Args:
        module: from `Result.trainable`.
        weight_lr: rate of everything that is not a step, relative to its size, at least 0; 3e-3 is a good start.
        step_lr: rate of steps relative to their value, at least 0; 1e-3 is a good start.

    Raises:
        OptionError: a rate is negative or not finite, or there is nothing to train.
    """
    for name, rate in (("weight_lr", weight_lr), ("step_lr", step_lr)):
        if not 0 <= rate < math.inf:
            raise OptionError(f"{name} is {rate}; give a finite rate of at least 0")
    quantizers = [m for m in module.modules() if isinstance(m, FakeQuantize)]
    steps = {q.scale: None for q in quantizers if isinstance(q.scale, nn.Parameter) and q.scale.requires_grad}
    rest = [p for p in module.parameters() if p.requires_grad and p not in steps]
    if not rest and not steps:
        raise OptionError("the module has no parameter that requires a gradient; give the module of Result.trainable()")
    sizes = [root_mean_square(p) for p in rest]
    known = sorted(size for size in sizes if size > 0)
    typical = known[len(known) // 2] if known else 1.0
    groups: list[dict[str, Any]] = [
        {"params": [p], "lr": weight_lr * (size or typical)} for p, size in zip(rest, sizes, strict=True)
    ]
    rates = {step: step_lr * float(step.detach().mean()) for step in steps}
    return groups + [{"params": [step], "lr": rate, "weight_decay": 0.0} for step, rate in rates.items()]


def root_mean_square(value: Tensor) -> float:
    """Return `sqrt(mean(value^2))`, 0 where there is no element."""
    return float(value.detach().float().square().mean().sqrt()) if value.numel() else 0.0


def distill_step(
    module: nn.Module,
    teacher: Callable[..., Any],
    images: Tensor | tuple[Tensor, ...],
    optimizer: Optimizer,
    loss: str | Loss | LossFunction | None = None,
) -> float:
    """Take one optimizer step towards the float model's answers and return the mean loss before the step.

    Args:
        module: from `Result.trainable`.
        teacher: the float model, for example `result.program.module`.
        images: one batch, or one tensor per input.
        optimizer: over the module's parameters.
        loss: as `quantize` takes it; None chooses by the teacher's answer, as `quantize` does.

    Raises:
        OptionError: the loss is unknown.
        FailureError: the loss is not finite.
    """
    inputs = images if isinstance(images, tuple) else (images,)
    with torch.no_grad():
        reference = first_tensor(_answering(teacher)(*inputs))
        compared = _loss(loss, teacher, inputs, reference)
    value = compared(reference, first_tensor(_answering(module)(*inputs)), None).mean()
    found = float(value.detach())
    if not math.isfinite(found):
        raise FailureError(f"the loss is {found}; start again with lower learning rates")
    optimizer.zero_grad()
    torch.autograd.backward(value)
    optimizer.step()
    return found


def _loss(
    given: str | Loss | LossFunction | None, teacher: Callable[..., Any], inputs: tuple[Tensor, ...], answer: Tensor
) -> Loss:
    """Return the loss of a teacher's answers; where it is no graph, that of the first one."""
    if isinstance(given, Loss):
        return given
    if isinstance(teacher, GraphModule):
        return answer_loss(given, teacher, inputs)
    return loss_of(given or ("kl" if answer.dim() == 2 and answer.shape[1] > 1 else "mse"))


def _answering(model: Callable[..., Any]) -> Callable[..., Any]:
    return answer_graph(model) if isinstance(model, GraphModule) else model


def reestimate(module: GraphModule, images: object, batch: int = 64, reference: GraphModule | None = None) -> int:
    """Compute the statistics of all batch norms left in a graph from images, and return the number of these norms.

    In one pass every norm normalizes by its batch, as in training; statistics become the mean over batches of the
    batch's mean and unbiased variance, weighted by images (cumulative average, as `torch.optim.swa_utils.update_bn`).

    With a reference, whose norms read values of mean `m_f` and variance `v_f` and have the statistics `m` and `v`,
    they become `v v_q / v_f` and `m_q - (m_f - m) sqrt(v_q / v_f)`: what a norm answers has the reference's moments.
    Statistics that several levels of a network shared in training are those of no level, and a network that has to
    follow such a one must not take its own.

    Args:
        module: from `Result.trainable`; it is changed.
        images: batches as `quantize` takes them.
        batch: images at a time.
        reference: the float graph that the module is a quantized copy of; None has no part in it.

    Raises:
        CalibrationError: the images cannot be used, or a batch has one value per channel.
        OptionError: a norm of the module is not in the reference.
    """
    norms = {node: _arguments(node) for node in module.graph.nodes if _is_norm(node)}
    if not norms:
        return 0
    data = collect(images, [str(node.target) for node in placeholders(module.graph)])
    runner = _BatchStatistics(module, norms)
    followed = None if reference is None else _Moments(reference, {node.name for node in norms})
    with torch.no_grad():
        for part in data.batches(batch):
            if followed is not None:
                followed.run(followed.steps, followed.given(part.inputs), keep=lambda _: False)
                runner.followed = followed.found
            runner.run(runner.steps, runner.given(part.inputs), keep=lambda _: False)
        for path, (total, weight) in runner.sums.items():
            put_tensor(module, path, (total / weight).float())
    return len(norms)


def _arguments(node: Node) -> list[str]:
    schema = getattr(node.target, "_schema", None)
    return [argument.name for argument in schema.arguments] if schema is not None else []


def _is_norm(node: Node) -> bool:
    # Ops differ between torch versions, their argument names do not. Computed statistics cannot be set.
    names = _arguments(node)
    return all(name in names and is_constant(node.args[names.index(name)]) for name in STATISTICS)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel in float64."""
    variance, mean = torch.var_mean(x.double(), dim=[axis for axis in range(x.dim()) if axis != 1], correction=0)
    return mean, variance


class _Moments(Runner):
    """Runs a graph and notes the moments of what its norms read.

    Args:
        module: the graph.
        names: of norms.

    Raises:
        OptionError: it has no norm of one of the names.
    """

    def __init__(self, module: GraphModule, names: set[str]) -> None:
        super().__init__(module)
        if missing := sorted(names - self.by_name.keys()):
            raise OptionError(f"the reference has no batch norm {missing}; give the float graph of the same result")
        self._names = names
        #: norm -> mean and variance of the last run
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def compute(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what a node makes of its arguments."""
        if node.name in self._names:
            self.found[node.name] = _moments(args[0])
        return super().compute(node, args, kwargs)


class _BatchStatistics(Runner):
    """Runs a graph with its norms on the statistics of the batch, and sums these up."""

    def __init__(self, module: GraphModule, norms: dict[Node, list[str]]) -> None:
        super().__init__(module)
        self._norms = norms
        #: path of a statistic -> sum over images, and images
        self.sums: dict[str, tuple[Tensor, int]] = {}
        #: norm -> moments in the reference for this batch; empty without one
        self.followed: Mapping[str, tuple[Tensor, Tensor]] = {}

    def compute(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what a node makes of its arguments, statistics of norms replaced."""
        if node not in self._norms:
            return super().compute(node, args, kwargs)
        places, values = self._norms[node], list(args)
        x: Tensor = values[0]
        count = x.numel() // x.shape[1]
        if count < 2:
            raise CalibrationError(f"{node.name}: a batch has one value per channel; give at least two images")
        mean, variance = _moments(x)
        kept = mean, variance * count / (count - 1)
        # The batch is normalized by its own variance; what is stored is the unbiased estimate.
        used = mean, variance
        if node.name in self.followed:
            given = (values[places.index(name)].double() for name in STATISTICS)
            used = kept = _shifted(mean, variance, *self.followed[node.name], *given)
        for name, value, instead in zip(STATISTICS, kept, used, strict=True):
            place = places.index(name)
            source = node.args[place]
            assert isinstance(source, Node)
            total, weight = self.sums.get(str(source.target), (torch.zeros_like(value), 0))
            self.sums[str(source.target)] = total + value * len(x), weight + len(x)
            values[place] = instead.to(x.dtype)
        return super().compute(node, values, kwargs)


def _shifted(
    mean: Tensor, variance: Tensor, float_mean: Tensor, float_variance: Tensor, old_mean: Tensor, old_variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Return statistics with which a norm answers as it does in the reference; channels that are constant keep theirs.

    Args:
        mean, variance: of what the norm reads.
        float_mean, float_variance: of what it reads in the reference.
        old_mean, old_variance: its statistics there.
    """
    alive = (variance > 0) & (float_variance > 0)
    ratio = torch.where(alive, variance / torch.where(alive, float_variance, torch.ones_like(variance)), 1.0)
    return mean - (float_mean - old_mean) * ratio.sqrt(), old_variance * ratio
