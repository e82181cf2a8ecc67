"""Insert fake-quant nodes: the simulated graph, which is also the training graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, FakeQuantNodes, Ranges, Rounding, WeightGrids
from fxquant.core.ir import (
    Choice,
    EdgeGroups,
    FakeQuantize,
    Program,
    Site,
    Sites,
    constant,
    erase_dead,
    insert_after,
    resolve,
    rule_of,
    set_parameter,
    stored_weights,
    tensor_at,
)
from fxquant.passes.base import Pass

BIAS_LIMIT = 2.0**31
"""Integers of a bias must fit the int32 accumulator."""


def group_bits(groups: EdgeGroups, sites: Sites, choices: dict[str, Choice], default: int) -> dict[str, int]:
    """Return the activation bits of every group: those its readers chose, `default` where no site reads it.

    Raises:
        OptionError: two sites that read one value chose different activation bits.
    """
    by_tie: dict[str, tuple[int, str]] = {}
    for site in (site for site in sites.sites if not site.stored):
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
    been left out when the edges were found. A `Rounding` made for this plan takes the place of nearest rounding.

    Args:
        fixed_bits: activation bits of groups that no site reads, for example the inputs of a residual add.
        round_biases: put rounded weights and biases in, as the kernels have them; False leaves the network with its
            quantizers off exactly float.

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
        rounding = Rounding.of(program, choices)
        for site in sites.sites if self.round_biases else ():
            _set_values(program, site, rounding)
        activations = {group: self._on_group(program, group, bits[group], rounding) for group in groups.producers}
        weights = {site.name: _on_weight(program, site, rounding) for site in sites.sites}
        for site in sites.sites if self.round_biases else ():
            _round_bias(program, site, rounding)
        nodes = FakeQuantNodes(weights, activations, {site.name: _read_by(program, site) for site in sites.sites})
        count = sum(len(names) for names in (*activations.values(), *weights.values()))
        return program.with_facts(nodes), count

    def _on_group(self, program: Program, group: str, bits: int, rounding: Rounding) -> tuple[str, ...]:
        groups, graph = program[EdgeGroups], program.module.graph
        grid = rounding.activations.get(group) or program[Ranges].grid(groups.producers[group], bits)
        names = []
        for producer in groups.producers[group]:
            users = [resolve(graph, e.consumer) for e in groups.edges[group] if e.producer == producer]
            inserted = FakeQuantize(grid)
            node = insert_after(program.module, resolve(graph, producer), f"quantize_{producer}", inserted, users)
            names.append(node.name)
        return tuple(names)


def _set_values(program: Program, site: Site, rounding: Rounding) -> None:
    """Put the rounding's weight and biases in the place of the model's."""
    module, graph = program.module, program.module.graph
    weight = rounding.weight_of(site.name, program[WeightGrids])
    for node in (resolve(graph, name) for name in site.nodes):
        rule = rule_of(node)
        if rule is None:
            if weight is not None:
                _replace_stored(module, site.weight, weight)
            continue
        for position, value in ((rule.weight, weight), (rule.bias, rounding.biases.get(node.name))):
            if position is None or value is None:
                continue
            old = node.args[position] if len(node.args) > position else None
            path = str(old.target) if isinstance(old, Node) else f"{site.weight}_bias_{node.name}"
            trainable = not isinstance(old, Node) or tensor_at(module, path).requires_grad
            # What others read as well keeps its values for them.
            if isinstance(old, Node) and not _read_only_by(
                program, path, site.readers if position == rule.weight else [node.name]
            ):
                path = f"{path}_{node.name}"
            set_parameter(module, node, position, path, value.clone(), trainable)
    erase_dead(module)


def _replace_stored(module: GraphModule, path: str, weight: Tensor) -> None:
    """Put a weight in the place of one that nothing but float ops of one site read, wherever among their arguments."""
    parent, _, leaf = path.rpartition(".")
    trainable = tensor_at(module, path).requires_grad
    setattr(module.get_submodule(parent), leaf, nn.Parameter(weight.clone(), requires_grad=trainable))


def _read_only_by(program: Program, path: str, names: Iterable[str]) -> bool:
    holders = [node for node in program.module.graph.nodes if node.op == "get_attr" and node.target == path]
    return {user.name for holder in holders for user in holder.users} <= set(names)


def _on_weight(program: Program, site: Site, rounding: Rounding) -> tuple[str, ...]:
    inserted = FakeQuantize(rounding.grid_of(site.name, program[WeightGrids]))
    graph, names = program.module.graph, []
    name = f"quantize_{site.weight.replace('.', '_')}"
    holders: dict[Node, list[Node]] = {}
    for reader in (resolve(graph, name) for name in site.readers):
        rule = rule_of(reader)
        read = stored_weights(reader) if rule is None else [reader.args[rule.weight or 0]]
        for weight in (n for n in read if isinstance(n, Node) and (rule is not None or n.target == site.weight)):
            holders.setdefault(weight, []).append(reader)
    for holder, readers in holders.items():
        names.append(insert_after(program.module, holder, name, inserted, readers).name)
    return tuple(names)


def _round_bias(program: Program, site: Site, rounding: Rounding) -> None:
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
        step = quantizer.scale * rounding.grid_of(site.name, program[WeightGrids]).scale
        integers = torch.round(value / step)
        rounded = torch.where(integers.abs() < BIAS_LIMIT, integers * step, value)
        path = str(bias.target)
        # A bias that other nodes read as well keeps its values for them.
        if not _read_only_by(program, path, (node.name,)):
            path = f"{path}_{node.name}"
        trainable = tensor_at(module, str(bias.target)).requires_grad
        set_parameter(module, node, rule.bias, path, rounded.to(value.dtype), trainable)
    erase_dead(module)


def _read_by(program: Program, site: Site) -> tuple[str, ...]:
    sources = (resolve(program.module.graph, name).args[0] for name in (() if site.stored else site.nodes))
    return tuple(dict.fromkeys(source.name for source in sources if isinstance(source, Node)))
