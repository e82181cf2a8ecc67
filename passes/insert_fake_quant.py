"""Insert fake-quant nodes: the simulated graph, which is also the training graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from fxquant.core.allocation import BitAllocation
from fxquant.core.edges import EdgeGroups
from fxquant.core.errors import OptionError
from fxquant.core.fake_quant import FakeQuantize
from fxquant.core.graphs import constant, erase_dead, insert_after, resolve, set_parameter, tensor_at
from fxquant.core.grids import FakeQuantNodes, WeightGrids
from fxquant.core.ops import rule_of
from fxquant.core.program import Program
from fxquant.core.ranges import Ranges
from fxquant.core.spec import Choice, Site, Sites, activation_spec
from fxquant.passes.base import Pass

BIAS_LIMIT = 2.0**31
"""Integers of a bias must fit the int32 accumulator."""


def group_bits(groups: EdgeGroups, sites: Sites, choices: dict[str, Choice], default: int) -> dict[str, int]:
    """Return the activation bits of every group: those its readers chose, `default` where no site reads it.

    Raises:
        OptionError: two sites that read one value chose different activation bits.
    """
    by_tie: dict[str, tuple[int, str]] = {}
    for site in sites.sites:
        bits = choices[site.name].activation_bits
        known, other = by_tie.setdefault(site.input_tie, (bits, site.name))
        if known != bits:
            raise OptionError(
                f"sites {other!r} and {site.name!r} read one value and must agree on activation bits, "
                f"not {known} and {bits}"
            )
    return {group: by_tie.get(tie, (default, ""))[0] for group, tie in groups.bit_ties.items()}


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Put `FakeQuantize` nodes on every quantized edge and every site's weight, at the plan's precision.

    Nodes are called `quantize_<producer>` and `quantize_<weight path>`. Sites that the plan leaves in float must have
    been left out when the edges were found.

    Args:
        fixed_bits: activation bits of groups that no site reads, for example the inputs of a residual add.
        round_biases: round biases as the kernels do; False leaves the network with its quantizers off exactly float.

    Raises:
        OptionError: the plan lacks a site, or names a width without a grid.
    """

    fixed_bits: int = 8
    round_biases: bool = True
    reads = (EdgeGroups, Sites, Ranges, WeightGrids, BitAllocation)
    writes = (FakeQuantNodes,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the simulated graph."""
        choices, groups, sites = program[BitAllocation].choices, program[EdgeGroups], program[Sites]
        missing = [site.name for site in sites.sites if site.name not in choices or choices[site.name].is_float]
        if missing:
            raise OptionError(f"the plan gives no integer precision to {', '.join(missing)}; name every site")
        bits = group_bits(groups, sites, choices, self.fixed_bits)
        activations = {group: self._on_group(program, group, bits[group]) for group in groups.producers}
        weights = {site.name: _on_weight(program, site, choices[site.name]) for site in sites.sites}
        for site in sites.sites if self.round_biases else ():
            _round_bias(program, site, choices[site.name])
        nodes = FakeQuantNodes(weights, activations, {site.name: _read_by(program, site) for site in sites.sites})
        count = sum(len(names) for names in (*activations.values(), *weights.values()))
        return program.with_facts(nodes), count

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
    grid = program[WeightGrids].at(site.name, choice.weight_bits)
    inserted = FakeQuantize(grid.spec, grid.scale, grid.zero_point)
    graph, names = program.module.graph, []
    name = f"quantize_{site.weight.replace('.', '_')}"
    for node in [n for n in graph.nodes if n.op == "get_attr" and n.target == site.weight]:
        readers: list[Node] = [user for user in node.users if user.name in site.nodes]
        names.append(insert_after(program.module, node, name, inserted, readers).name)
    return tuple(names)


def _round_bias(program: Program, site: Site, choice: Choice) -> None:
    """Round the biases of a site's ops to `scale_x scale_w`, the step of the int32 accumulator they are added to.

    The error is far below a step of the output, but in a deep network it moves values across rounding edges, and the
    simulation would drift from what the kernels compute. Biases that need more than 31 bits stay as they are: backends
    coarsen the weights of such channels.
    """
    module, graph = program.module, program.module.graph
    for node in (resolve(graph, name) for name in site.nodes):
        rule, source = rule_of(node), node.args[0]
        if rule is None or rule.bias is None or len(node.args) <= rule.bias or not isinstance(source, Node):
            continue
        bias, quantizer = node.args[rule.bias], module.get_submodule(str(source.target))
        value = constant(module, bias)
        if value is None or not isinstance(bias, Node) or not isinstance(quantizer, FakeQuantize):
            continue
        step = quantizer.scale * program[WeightGrids].at(site.name, choice.weight_bits).scale
        integers = torch.round(value / step)
        rounded = torch.where(integers.abs() < BIAS_LIMIT, integers * step, value)
        path = str(bias.target)
        # A bias that other nodes read as well keeps its values for them.
        if sum(len(n.users) for n in graph.nodes if n.op == "get_attr" and n.target == path) > 1:
            path = f"{path}_{node.name}"
        trainable = tensor_at(module, str(bias.target)).requires_grad
        set_parameter(module, node, rule.bias, path, rounded.to(value.dtype), trainable)
    erase_dead(module)


def _read_by(program: Program, site: Site) -> tuple[str, ...]:
    sources = (resolve(program.module.graph, name).args[0] for name in site.nodes)
    return tuple(dict.fromkeys(source.name for source in sources if isinstance(source, Node)))
