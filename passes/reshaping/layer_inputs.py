"""Layers whose input channels may change, with what their inputs hold."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxquant.core.host import SILENT, Reporter
from fxquant.core.ir import Program, Site, Sites, resolve, shape_of, tensor_at
from fxquant.core.run import CalibrationSet
from fxquant.passes.formats import Patches
from fxquant.passes.rounding.closed_form import Prefix, geometry_of, go_to, scale_chains
from fxquant.passes.rounding.closed_form.layerwise import gram_of


@dataclass(frozen=True, eq=False)
class Layer:
    """A site, its weight and the second moments of its input.

    Args:
        site: with one group, so that every output reads every input channel.
        weight: shape (outputs, inputs, ...).
        gram: float64, shape (K, K).
    """

    site: Site
    weight: Tensor = field(repr=False)
    gram: Tensor = field(repr=False)

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return int(self.weight.shape[1])

    @property
    def taps(self) -> int:
        """Weights of one input channel and one output."""
        return int(self.weight[0, 0].numel())

    @property
    def rows(self) -> Tensor:
        """The weight by outputs, float64 of shape (outputs, K)."""
        return self.weight.detach().double().flatten(1)


@dataclass(frozen=True)
class Pair:
    """Two layers, the second of which is the only reader of the first's output.

    Args:
        producer: site that makes the channels.
        consumer: site that reads them.
        made: the producer's output channel for each input channel of the consumer.
    """

    producer: str
    consumer: str
    made: tuple[int, ...]


def layers_of(program: Program, images: CalibrationSet, reporter: Reporter = SILENT) -> dict[str, Layer | Site]:
    """Return site name -> layer, in graph order; the site itself where its input channels are in groups.

    Args:
        program: float network with its sites.
        images: calibration images.
        reporter: shows progress.
    """
    walk, found = Prefix(program.module, images), dict[str, Layer | Site]()
    sites = program[Sites].sites
    for site in reporter.track(sites, "second moments of inputs", len(sites)):
        nodes = [resolve(program.module.graph, name) for name in site.nodes]
        weight = tensor_at(program.module, site.weight)
        plain = not site.stored and not site.followers and weight.dim() >= 2
        if not plain or any(geometry_of(node).groups != 1 for node in nodes):
            found[site.name] = site
            continue
        _ = go_to(site.nodes[0], walk)
        gram = gram_of(site, program.module, walk)
        dense = gram.rows.transpose(1, 2) @ gram.rows if isinstance(gram, Patches) else gram
        found[site.name] = Layer(site, weight.detach(), dense[0])
    return found


def pairs_of(program: Program, layers: dict[str, Layer | Site], images: CalibrationSet) -> tuple[Pair, ...]:
    """Return pairs between which channels may be left out; no layer takes part in two of them.

    Every channel of the producer is one input channel of the consumer, and zeros stay zeros on the way.

    Args:
        program: float network with its sites.
        layers: as `layers_of` returns them.
        images: one of them is run.
    """
    owner = {name: layer.site for layer in layers.values() if isinstance(layer, Layer) for name in layer.site.nodes}
    chains, _ = scale_chains(program, images)
    pairs, used = list[Pair](), set[str]()
    for chain in chains:
        first, second = owner.get(chain.first), owner.get(chain.second)
        if first is None or second is None or {first.name, second.name} & used:
            continue
        met = chain.channels.flatten(2)[0, :, 0] if chain.channels.dim() > 2 else chain.channels[0]
        outputs = shape_of(resolve(program.module.graph, chain.first).args[1])[0]
        # More inputs than channels come of a reshape, whose sizes are in the graph.
        if torch.equal(met.sort().values, torch.arange(outputs).to(met)):
            pairs.append(Pair(first.name, second.name, tuple(int(c) for c in met)))
            used |= {first.name, second.name}
    return tuple(pairs)
