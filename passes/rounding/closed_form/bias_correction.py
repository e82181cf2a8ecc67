"""Bias correction: subtract from each bias the shift of its channel's mean that rounding causes (arXiv 1906.04721)."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.core.facts import Rounding
from fxquant.core.ir import Program, resolve
from fxquant.passes.rounding.closed_form.input_gram import channel_axis
from fxquant.passes.rounding.closed_form.output_moments import bias_of
from fxquant.passes.rounding.closed_form.prefix import Prefix, go_to
from fxquant.passes.rounding.closed_form.verdict import judged
from fxquant.passes.rounding.registry import ROUNDERS, RoundingTask


@ROUNDERS.register("bias_correction")
def bias_correction(task: RoundingTask) -> Program:
    """Restore every channel's mean to the float network's, op by op, each after those before it were corrected.

    `b <- b + E[y_float] - E[y_quantized]` per output channel, means over images and positions before the
    activation: the empirical variant of arXiv 1906.04721, section 4.2. Weights stay as earlier algorithms rounded
    them; an op without a bias gets one.
    """
    started = time.perf_counter()
    rounding = corrected_biases(task)
    return judged(task, rounding, "bias_correction", time.perf_counter() - started)


def corrected_biases(task: RoundingTask) -> Rounding:
    """Return the task's rounding with corrected biases."""
    simulated = task.simulated()
    quantized = Prefix(simulated.module, task.images)
    floating = Prefix(task.program.module, task.images, quantized.batch)
    names = {name for site in task.sites for name in site.nodes}
    ops = [node.name for node in simulated.module.graph.nodes if node.name in names]
    biases: dict[str, Tensor] = {}
    for name in task.reporter.track(ops, "bias_correction", len(ops)):
        _ = go_to(name, quantized, floating)
        quantized.past(name)
        floating.past(name)
        node = resolve(simulated.module.graph, name)
        shift = channel_means(floating.value(name), node) - channel_means(quantized.value(name), node)
        # The op is linear in its bias, so that its output is shifted instead of run again.
        dimensions = quantized.value(name)[0].dim()
        shape = [-1] + [1] * (dimensions - 1 - channel_axis(dimensions, node))
        quantized.change(name, partial(_shifted, shift=shift.reshape(shape)))
        biases[name] = (bias_of(simulated, node) + shift).float()
    return replace(task.rounding, biases={**task.rounding.biases, **biases})


def channel_means(values: list[Tensor], node: Node) -> Tensor:
    """Return the mean of each output channel over images and positions, float64 of shape (channels,).

    Args:
        values: the op's output, batch by batch.
        node: the op.
    """
    axis = channel_axis(values[0].dim(), node)
    rows = [value.movedim(axis, 0).flatten(1) for value in values]
    total = torch.stack([row.sum(dim=1, dtype=torch.float64) for row in rows]).sum(dim=0)
    return total / sum(row.shape[1] for row in rows)


def _shifted(value: Tensor, shift: Tensor) -> Tensor:
    return value + shift.to(value.dtype)
