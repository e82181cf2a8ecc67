"""Cross-layer equalization: scale channels between two layers to equal ranges (arXiv 1906.04721, section 4.1)."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.core.errors import OptionError
from fxquant.core.facts import Ranges, Settings, Target, WeightGrids
from fxquant.core.ir import Program, Sites, fork, put_tensor, resolve, rule_of, tensor_at
from fxquant.core.run import OBSERVERS, CalibrationSet, GraphReplay
from fxquant.passes.rounding.acceptance import record_of
from fxquant.passes.rounding.closed_form.chains import ScaleChain, scale_chains
from fxquant.passes.rounding.closed_form.prefix import BATCH
from fxquant.passes.rounding.closed_form.verdict import first_site, judged, recorded
from fxquant.passes.rounding.registry import ROUNDERS, RoundingTask
from fxquant.passes.scale_weights import weight_grids

SWEEPS = 100
CONVERGED = 1e-4
"""Largest `|log s|` of a sweep after which the sweeps end."""

REASONS = 3
"""Reasons listed where no layer can be scaled."""


@ROUNDERS.register("equalize")
def equalize(task: RoundingTask) -> Program:
    """Scale channels between neighbouring layers so that the weights of both have equal ranges.

    `W1 <- W1 / s, b1 <- b1 / s, W2 <- W2 s` with `s_i = sqrt(r1_i r2_i) / r2_i`, r1 and r2 the largest |weight| of
    channel i in the first and the second layer; arXiv 1906.04721, eq. 11, swept over all pairs until it converges. The
    float network's function does not change. Ranges between the layers are observed and weight grids searched again.

    Raises:
        OptionError: an earlier algorithm chose weights, biases or grids, which belong to the unscaled network.
    """
    earlier = task.rounding
    if earlier.weights or earlier.biases or earlier.grids or earlier.activations:
        raise OptionError(
            f"equalize cannot follow {earlier.method!r}, which rounded the unscaled weights; put it first"
        )
    started = time.perf_counter()
    chains, refusals = scale_chains(task.program, task.images)
    if not chains:
        # A deep network has the same reason for every layer.
        reasons = [*list(refusals.values())[:REASONS], *(["..."] if len(refusals) > REASONS else [])]
        reason = "no two layers can be equalized: " + "; ".join(reasons)
        seconds = time.perf_counter() - started
        return recorded(task, earlier, record_of(first_site(task), "equalize", None, None, reason, seconds))
    parameters = equalized(task.program.module, chains)
    program = with_parameters(task.program, chains, parameters, task.images)
    notes = tuple(f"the output of {name!r} is not equalized: {why}" for name, why in refusals.items())
    rounding = replace(earlier, parameters={**earlier.parameters, **parameters}, notes=(*earlier.notes, *notes))
    return judged(task, rounding, "equalize", time.perf_counter() - started, program)


@dataclass
class _Layer:
    """The parameters of a weighted op in float64, scaled in place."""

    weight_path: str
    bias_path: str | None
    weight: Tensor
    bias: Tensor | None


def equalized(module: GraphModule, chains: list[ScaleChain]) -> dict[str, Tensor]:
    """Return attribute path -> equalized parameter, of the type of the module's own, for every op of a chain."""
    names = dict.fromkeys(name for chain in chains for name in (chain.first, chain.second))
    layers = {name: _layer(module, name) for name in names}
    for _ in range(SWEEPS):
        moved = [_balance(layers[chain.first], layers[chain.second], chain.channels) for chain in chains]
        if max(moved) < CONVERGED:
            break
    found: dict[str, Tensor] = {}
    for layer in layers.values():
        found[layer.weight_path] = layer.weight.to(tensor_at(module, layer.weight_path).dtype)
        if layer.bias is not None and layer.bias_path is not None:
            found[layer.bias_path] = layer.bias.to(tensor_at(module, layer.bias_path).dtype)
    return found


def _layer(module: GraphModule, name: str) -> _Layer:
    node = resolve(module.graph, name)
    rule = rule_of(node)
    assert rule is not None
    paths = [_path(node, rule.weight), _path(node, rule.bias)]
    weight, bias = (None if path is None else tensor_at(module, path).detach().double() for path in paths)
    assert paths[0] is not None
    assert weight is not None
    return _Layer(paths[0], paths[1], weight, bias)


def _path(node: Node, position: int | None) -> str | None:
    """Return the attribute path of a weight or bias, None where the op has none."""
    source = node.args[position] if position is not None and len(node.args) > position else None
    return str(source.target) if isinstance(source, Node) else None


def _balance(first: _Layer, second: _Layer, channels: Tensor) -> float:
    """Scale one pair and return the largest `|log s|`."""
    count = first.weight.shape[0]
    one = first.weight.abs().flatten(1).amax(dim=1)
    # Slot 0 collects the elements that read no channel (padding), the others are by channel.
    two = torch.zeros(count + 1, dtype=one.dtype, device=one.device)
    two.scatter_reduce_(0, (channels + 1).flatten(), second.weight.abs().flatten(), "amax")
    two = two[1:]
    # A channel that is zero on either side gains nothing from scaling.
    alive = (one > 0) & (two > 0)
    # sqrt(r1 r2) / r2 = sqrt(r1 / r2); dead channels would divide by zero.
    scale = torch.where(alive, torch.sqrt(one / two), torch.ones_like(one))
    first.weight = first.weight / scale.reshape([-1] + [1] * (first.weight.dim() - 1))
    first.bias = None if first.bias is None else first.bias / scale
    second.weight = second.weight * torch.cat([torch.ones_like(scale[:1]), scale])[channels + 1]
    return float(scale.log().abs().max())


def with_parameters(
    program: Program, chains: list[ScaleChain], parameters: dict[str, Tensor], images: CalibrationSet
) -> Program:
    """Return the program with the parameters, and with new ranges between scaled layers and new weight grids.

    Args:
        program: calibrated float program.
        chains: the scaled pairs.
        parameters: attribute path -> value.
        images: run to observe the values between the layers again.
    """
    module = fork(program.module)
    for path, value in parameters.items():
        # In place: a saved result is known by its graph, which stays as it was captured.
        put_tensor(module, path, value.clone())
    scaled = Program(module, program.facts, program.log)
    values = {name for chain in chains for name in chain.between}
    ranges = observed(scaled, values & set(program[Ranges].histograms), images)
    known = program[WeightGrids]
    changed = {site.name: parameters[site.weight] for site in program[Sites].sites if site.weight in parameters}
    per_channel = program[Target].per_channel
    fresh = {name: weight_grids(weight, known.grids[name], 0, per_channel) for name, weight in changed.items()}
    rounded = {(name, chosen): weight for (name, chosen), weight in known.rounded.items() if name not in changed}
    return scaled.with_facts(ranges, WeightGrids({**known.grids, **fresh}, rounded))


def observed(program: Program, producers: set[str], images: CalibrationSet) -> Ranges:
    """Return the program's ranges, those of these producers observed again with the program's own observer."""
    known = program[Ranges]
    settings: Settings | None = program.facts.get(Settings)
    name = settings.observer if settings is not None else {"full": "minmax"}.get(known.clip, known.clip)
    observers = {producer: OBSERVERS[name](producer) for producer in producers}
    replay = GraphReplay(program.module)
    kept = frozenset(replay.by_name[producer] for producer in producers)
    with torch.no_grad():
        for part in images.batches(BATCH):
            _, environment = replay.forward(part.inputs, kept=kept)
            for producer, observer in observers.items():
                observer(environment[replay.by_name[producer]])
    fresh = {producer: observer.histogram() for producer, observer in observers.items()}
    return Ranges({**known.histograms, **fresh}, known.clip, known.factors)
