"""Loss of a layer's weights and of its activations, each alone, from the measured losses of its widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fxquant.core.ir import Choice


def operand_rows(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each integer layer scored at several activation widths, the measured loss of its operands.

    `weights`: loss with the weights at the plan's width and the activations at the widest that was scored;
    `activations`: the other way round; `both`: the plan's own precision. Each with all other layers as scoring had
    them. A layer scored at one activation width has no row: all its losses are of its weights.

    Args:
        layers: from `fxquant.report.layers.layer_rows`.
    """
    rows = []
    for layer in layers:
        losses = {Choice.parse(label): loss for label, loss in layer["losses"].items() if label != "float"}
        chosen = Choice.parse(layer["choice"])
        widths = {choice.activation_bits for choice in losses if not choice.weights_only}
        if chosen not in losses or len(widths) < 2:
            continue
        narrow_weights = replace(chosen, activation_bits=max(widths))
        widest = max(choice.weight for choice in losses)
        narrow_activations = Choice.of(widest, chosen.activation_bits)
        row = {"name": layer["name"], "choice": layer["choice"], "both": losses[chosen]}
        row |= {"weights": losses.get(narrow_weights), "activations": losses.get(narrow_activations)}
        rows.append(row)
    return rows
