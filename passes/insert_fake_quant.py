"""Insert fake-quant nodes: the simulated graph, which is also the training graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from fxquant.core.allocation import BitAllocation
from fxquant.core.edges import EdgeGroups
from fxquant.core.fake_quant import FakeQuantize
from fxquant.core.graphs import insert_after, resolve, tensor_at
from fxquant.core.numerics import weight_parameters
from fxquant.core.ops import rule_of
from fxquant.core.program import Program
from fxquant.core.ranges import Ranges
from fxquant.core.spec import Choice, QuantSpec, Site, Sites, activation_spec, weight_spec
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class FakeQuantNodes:
    """Where the quantizers ended up.

    Args:
        weights: site name -> names of the fake-quant nodes on its weight.
        activations: group name -> names of the fake-quant nodes on its values.
    """

    weights: dict[str, tuple[str, ...]] = field(default_factory=dict)
    activations: dict[str, tuple[str, ...]] = field(default_factory=dict)


def group_bits(groups: EdgeGroups, sites: Sites, choices: dict[str, Choice], default: int) -> dict[str, int]:
    """Return the activation bits of every group: those its readers chose, `default` where no site reads it."""
    by_tie = {
        site.input_tie: choices[site.name].activation_bits
        for site in sites.sites
        if site.name in choices and not choices[site.name].is_float
    }
    return {group: by_tie.get(tie, default) for group, tie in groups.bit_ties.items()}


def site_weight_spec(program: Program, site: Site, bits: int) -> QuantSpec:
    """Return the weight grid of a site at a width, channels along the axis its op counts outputs on."""
    rule = rule_of(resolve(program.module.graph, site.nodes[0]))
    assert rule is not None
    return weight_spec(bits, rule.channel_axis)


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Put `FakeQuantize` nodes on every quantized edge and every site's weight, at the plan's precision.

    Nodes are called `quantize_<producer>` and `quantize_<weight path>`. The graph must be the one its edges were
    found on, with sites the plan leaves in float already excluded.

    Args:
        fixed_bits: activation bits of groups that no site reads, for example the inputs of a residual add.
    """

    fixed_bits: int = 8
    reads = (EdgeGroups, Sites, Ranges, BitAllocation)
    writes = (FakeQuantNodes,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the simulated graph."""
        choices, groups, sites = program[BitAllocation].choices, program[EdgeGroups], program[Sites]
        bits = group_bits(groups, sites, choices, self.fixed_bits)
        activations = {group: self._on_group(program, group, bits[group]) for group in groups.producers}
        weights = {
            site.name: _on_weight(program, site, choices[site.name])
            for site in sites.sites
            if not choices[site.name].is_float
        }
        count = sum(len(names) for names in (*activations.values(), *weights.values()))
        return program.with_facts(FakeQuantNodes(weights, activations)), count

    def _on_group(self, program: Program, group: str, bits: int) -> tuple[str, ...]:
        spec, groups, graph = activation_spec(bits), program[EdgeGroups], program.module.graph
        scale, zero_point = program[Ranges].parameters(groups.producers[group], spec)
        names = []
        for producer in groups.producers[group]:
            users = [resolve(graph, e.consumer) for e in groups.edges[group] if e.producer == producer]
            inserted = FakeQuantize(spec, scale, zero_point)
            node = insert_after(program.module, resolve(graph, producer), f"quantize_{producer}", inserted, users)
            names.append(node.name)
        return tuple(names)


def _on_weight(program: Program, site: Site, choice: Choice) -> tuple[str, ...]:
    spec = site_weight_spec(program, site, choice.weight_bits)
    inserted = FakeQuantize(spec, *weight_parameters(tensor_at(program.module, site.weight), spec))
    graph, names = program.module.graph, []
    name = f"quantize_{site.weight.replace('.', '_')}"
    for node in [n for n in graph.nodes if n.op == "get_attr" and n.target == site.weight]:
        readers: list[Node] = [user for user in node.users if user.name in site.nodes]
        names.append(insert_after(program.module, node, name, inserted, readers).name)
    return tuple(names)
