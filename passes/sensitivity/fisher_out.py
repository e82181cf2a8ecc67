"""`fisher_out`: squared gradient times squared shift, element by element of each op's output (ModelOpt's AutoQuantize).

Squaring before summing treats the elements of an output as independent. The factor 1/2, which ModelOpt leaves out, puts
the score in units of the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxquant.passes.sensitivity.backward import Gradients, Tape, per_image
from fxquant.passes.sensitivity.cell_sweep import Cell
from fxquant.passes.sensitivity.columns import Column, Replacement
from fxquant.passes.sensitivity.mpqco import label_cotangents
from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Batch, Scorer


@estimator("fisher_out", float_only=True, curvature=True)
def fisher_out(scorer: Scorer) -> Estimate:
    """Return `values = diag(E sum g_Y^2 dY^2 / 2)` over the outputs Y of the ops a column changes, about 2 passes.

    g is the gradient of log p(y) with y sampled from the model. Values that other ops than layers read, for example a
    residual add, count at the quantizer.
    """
    found = scorer.by_batch("backward pass of outputs", "fisher_out", _cell)
    return Estimate.diagonal(found.joined("squares") / 2, found.evaluations)


def _cell(scorer: Scorer, batch: Batch) -> Cell:
    tape = Tape(scorer, batch)
    gradients = tape.gradients(label_cotangents(scorer, batch, tape.reference))
    #: of the column at hand and the one before, which often round the same activations
    known: dict[tuple[str, Replacement], Tensor] = {}
    squares = []
    for column in scorer.columns:
        known = {each: known[each] for each in column.substitution.items() if each in known}
        squares.append(_squares(tape, gradients, column, known))
    return {"squares": torch.stack(squares).cpu().numpy()}


def _squares(tape: Tape, gradients: Gradients, column: Column, known: dict[tuple[str, Replacement], Tensor]) -> Tensor:
    """Return `sum g^2 d^2` of one column, float64 of shape (images,); `known` are rounded values."""
    by_name, environment = tape.scorer.replay.by_name, tape.environment
    layers = {op: None for ops in tape.ops.values() for op in ops}
    total = torch.zeros(tape.images, dtype=torch.float64)
    changed: dict[Node, Tensor] = {}
    with torch.no_grad():
        for name, replacement in column.substitution.items():
            node = by_name[name]
            if (name, replacement) not in known:
                known[name, replacement] = replacement(environment[node])
            value = known[name, replacement]
            if all(user in layers for user in node.users):
                changed[node] = value
            elif name in gradients:
                total += per_image(node, (gradients[name] * (value - environment[node])).square_(), tape.images)
        for op in layers:
            values = [node for node in tape.values(op) if node.name in gradients]
            if not values or not any(source in changed for source in op.all_input_nodes):
                continue
            answer = _rerun(tape, op, changed)
            for node in values:
                shift = (answer if node is op else answer[node.args[1]]) - environment[node]
                total += per_image(node, shift.mul_(gradients[node.name]).square_(), tape.images)
    return total


def _rerun(tape: Tape, op: Node, changed: dict[Node, Tensor]) -> Any:
    lookup = {node: changed.get(node, tape.environment[node]) for node in op.all_input_nodes}
    tape.scorer.replay.spent += tape.scorer.costs[op.name]
    args: Any = map_arg(op.args, lookup.__getitem__)
    kwargs: Any = map_arg(op.kwargs, lookup.__getitem__)
    return tape.scorer.replay.compute(op, args, kwargs)
