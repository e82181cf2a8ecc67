"""What the plan's quantizers do: range, scale and zero-point of every edge, noise of every weight, as plain values."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.backends.exact import edge_labels
from fxquant.core.facts import FakeQuantNodes, Histogram, Ranges, merged
from fxquant.core.ir import EdgeGroups, FakeQuantize, Program, Sites, resolve, tensor_at


def edge_rows(simulated: Program) -> list[dict[str, Any]]:
    """Return a row for each grid of activations in the simulated graph, in graph order.

    `minimum` and `maximum` are what calibration saw, `low` and `high` the ends of the grid, `clipped` the share of
    calibration values beyond them, and `sqnr_db = 10 log10(sum x^2 / sum (x - quantized x)^2)` over the calibration
    histogram, None where nothing is lost.
    """
    nodes, groups = simulated.facts.get(FakeQuantNodes), simulated[EdgeGroups]
    if nodes is None:
        return []
    labels = edge_labels(simulated.module)
    return [
        _edge_row(simulated, names, groups.producers[group], [labels.get(name, name) for name in names])
        for group, names in nodes.activations.items()
        if names
    ]


def _edge_row(
    simulated: Program, names: tuple[str, ...], producers: tuple[str, ...], places: list[str]
) -> dict[str, Any]:
    _, quantizer = _quantizer(simulated.module, names[0])
    scale, zero_point, spec = float(quantizer.step), int(quantizer.zero_point), quantizer.spec
    seen = merged(simulated[Ranges].histograms[producer] for producer in producers)
    low, high = ((end - zero_point) * scale for end in (spec.qmin, spec.qmax))
    row = {"name": places[0], "places": places, "producers": list(producers), "bits": spec.bits}
    row |= {"minimum": seen.minimum, "maximum": seen.maximum, "scale": scale, "zero_point": zero_point}
    return {**row, "low": low, "high": high, **_noise(seen, scale, low, high)}


def _noise(seen: Histogram, scale: float, low: float, high: float) -> dict[str, float | None]:
    centres, counts = seen.centres, seen.counts
    error = np.square(np.clip(np.round(centres / scale) * scale, low, high) - centres)
    outside = (centres < low - scale / 2) | (centres > high + scale / 2)
    signal, noise = float(counts @ np.square(centres)), float(counts @ error)
    return {"clipped": float(counts[outside].sum() / counts.sum()), "sqnr_db": _decibels(signal, noise)}


def weight_noise(program: Program, simulated: Program) -> dict[str, float | None]:
    """Return `10 log10(sum w^2 / sum (w - quantized w)^2)` of every layer that the plan quantizes.

    Against the float weight; None where nothing is lost. Weights rounded to keep the network's output are often noisier
    than weights rounded to nearest.
    """
    nodes = simulated.facts.get(FakeQuantNodes)
    found: dict[str, float | None] = {}
    for site in program[Sites].sites:
        if nodes is None or site.name not in nodes.weights:
            continue
        source, quantizer = _quantizer(simulated.module, nodes.weights[site.name][0])
        weight = tensor_at(program.module, site.weight).detach().double()
        rounded: Tensor = quantizer(tensor_at(simulated.module, str(source.target)).detach())
        found[site.name] = _decibels(float(weight.square().sum()), float((weight - rounded.double()).square().sum()))
    return found


def _quantizer(module: GraphModule, name: str) -> tuple[Node, FakeQuantize]:
    node = resolve(module.graph, name)
    source, quantizer = node.args[0], module.get_submodule(str(node.target))
    assert isinstance(source, Node)
    assert isinstance(quantizer, FakeQuantize)
    return source, quantizer


def _decibels(signal: float, noise: float) -> float | None:
    """Return a ratio of powers in dB, None where it is infinite or undefined."""
    return None if noise <= 0.0 or signal <= 0.0 else float(10 * np.log10(signal / noise))
