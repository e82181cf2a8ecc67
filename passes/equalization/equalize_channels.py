"""Equalize the channels of every value whose step they share, before calibration."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.core.facts import ChannelScales, NormStatistics
from fxquant.core.ir import EdgeGroups, Program, QuantizedEdges, Sites, fork, gradients, rule_of, tensor_at
from fxquant.core.run import CalibrationSet
from fxquant.passes.base import Pass
from fxquant.passes.equalization.channel_factors import ChannelFactors, channel_factors
from fxquant.passes.equalization.factor_classes import ONE
from fxquant.passes.equalization.measure_noise import measured_noise, recorded_batch
from fxquant.passes.equalization.rounding_noise import fewest_noise
from fxquant.passes.insert_observers import without_observers

IMAGES = 64
"""Calibration images that are looked at; more change the factors little."""
PREDICTED = 0.02
"""Least logarithm by which the model's noise must fall: on MobileNetV2 it falls by .005, on ResNet-20 by .065."""
STEPS_OF_TWO = 16
"""Factors are powers of the 16th root of 2."""


@dataclass(frozen=True)
class EqualizeChannels(Pass):
    """Write `ChannelScales`, and give the parameters their factors: the network computes what it did, up to round-off.

    Where the model says that factors change next to nothing, none are taken, and none need to be judged.

    A value has one step for all of its channels, so that a channel of small range is rounded coarsely (arXiv
    1906.04721, section 4.1, for pairs of layers; arXiv 2211.10438 for normalization and the layer behind it). Here
    every factor that the graph allows is found at once, and the factors minimize a model of the noise of all values
    and weights.

    Args:
        images: calibration images.
    """

    images: CalibrationSet = field(repr=False)
    reads = (QuantizedEdges, EdgeGroups, Sites)
    writes = (ChannelScales,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with equalized channels; the graph stays as it is."""
        module = without_observers(program.module)
        batch = min(recorded_batch(module), IMAGES, len(self.images))
        factors = channel_factors(module, self.images.slice(0, batch).inputs)
        if factors.count < 2:
            return program.with_facts(ChannelScales()), 0
        noise = measured_noise(program, module, factors, self.images.slice(0, IMAGES), batch)
        found = fewest_noise(noise)
        before, after = (noise.total(each).log() for each in (torch.zeros(factors.count), found.log().float()))
        if float(before - after) < PREDICTED:
            return program.with_facts(ChannelScales()), 0
        # Rounded, so that round-off in the search changes nothing in what comes out.
        steps = torch.round(found.log2() * STEPS_OF_TWO)
        scales = _scales(module, factors, torch.exp2(steps / STEPS_OF_TWO))
        return scaled(program, scales), 0


def _scales(module: GraphModule, factors: ChannelFactors, values: Tensor) -> ChannelScales:
    """Return the factors by parameter, of each one's number of axes, where they are not all 1."""
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for path, uses in factors.parameters.items():
        axes = tensor_at(module, path).dim()
        for part, classes in zip(parts, uses, strict=True):
            if classes is not None and bool((classes != ONE).any()):
                part[path] = values[classes].reshape([1] * (axes - classes.dim()) + list(classes.shape))
    return ChannelScales(*parts)


def scaled(program: Program, scales: ChannelScales) -> Program:
    """Return a program whose parameters have their factors, and what is known of them likewise.

    Args:
        program: its graph may hold observers.
        scales: factors of the parameters.

    Raises:
        FileFormatError: factors that do not fit their parameter.
        PipelineError: the program has no parameter of that path.
    """
    module = fork(program.module)
    with gradients():
        for path in scales.paths:
            old = tensor_at(module, path)
            value = scales.of(path, old)
            parent, _, leaf = path.rpartition(".")
            trained = isinstance(old, nn.Parameter)
            setattr(module.get_submodule(parent), leaf, nn.Parameter(value, old.requires_grad) if trained else value)
    facts: list[object] = [scales]
    if NormStatistics in program:
        facts.append(_scaled_statistics(program, scales))
    return Program(module, program.facts, program.log).with_facts(*facts)


def _scaled_statistics(program: Program, scales: ChannelScales) -> NormStatistics:
    """Return what folded normalizations knew, of outputs that are scaled now: `s y = s factor (a - mean) + s shift`."""
    known = dict(program[NormStatistics].folded)
    for node in program.module.graph.nodes:
        rule = rule_of(node)
        if node.name not in known or rule is None or rule.weight is None:
            continue
        path = str(node.args[rule.weight].target)
        if path in scales.multiplied:
            factor, each = scales.multiplied[path].flatten().float(), known[node.name]
            known[node.name] = replace(each, factor=each.factor * factor, shift=each.shift * factor)
    return NormStatistics(known)
