"""The network in its new shape: split channels are read twice, channels left out are not computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.core.errors import PipelineError
from fxquant.core.ir import Program, Sites, fork, put_tensor, resolve, rule_of, tensor_at
from fxquant.core.ir.graphs import free_path, is_constant
from fxquant.passes.reshaping.layer_inputs import Pair
from fxquant.passes.reshaping.variants import Variant
from fxquant.passes.rounding.closed_form.input_gram import channel_axis

aten = torch.ops.aten


def reshaped(program: Program, chosen: Mapping[str, Variant], pairs: Sequence[Pair]) -> GraphModule:
    """Return the float network with the chosen variants, to be captured again.

    Where no channel is left out it answers as before.

    Args:
        program: float network with its sites.
        chosen: site -> variant.
        pairs: who makes the channels that are left out.
    """
    module, sites = fork(program.module), program[Sites]
    makers = {pair.consumer: pair for pair in pairs}
    for name, variant in chosen.items():
        if variant.weight is None:
            continue
        site = sites.by_name(name)
        put_tensor(module, site.weight, variant.weight.to(tensor_at(module, site.weight)))
        for node in site.nodes:
            if variant.split:
                _read_twice(module, resolve(module.graph, node), variant.split)
    # After all weights have their inputs: a producer's own inputs may have changed too.
    for name, variant in chosen.items():
        if variant.dropped:
            pair = makers[name]
            gone = {pair.made[channel] for channel in variant.dropped}
            maker = sites.by_name(pair.producer)
            _make_fewer(module, resolve(module.graph, maker.nodes[0]), gone)
    module.graph.lint()
    module.recompile()
    return module


def _read_twice(module: GraphModule, node: Node, channels: tuple[int, ...]) -> None:
    """Let an op read these channels of its input again, behind all others."""
    source = node.args[0]
    if not isinstance(source, Node):
        raise PipelineError(f"node {node.name!r} reads no value of the graph")
    axis = channel_axis(source.meta["val"].dim(), node)
    path = free_path(module, f"{node.name}_split")
    module.register_buffer(path, torch.tensor(channels, dtype=torch.long))
    with module.graph.inserting_before(node):
        places = module.graph.get_attr(path)
        again = module.graph.call_function(aten.index_select.default, (source, axis, places))
        both = module.graph.call_function(aten.cat.default, ([source, again], axis))
    node.update_arg(0, both)


def _make_fewer(module: GraphModule, node: Node, gone: set[int]) -> None:
    """Leave out these output channels of an op."""
    rule = rule_of(node)
    assert rule is not None
    assert rule.weight is not None
    for position in (rule.weight, rule.bias):
        source = node.args[position] if position is not None and len(node.args) > position else None
        if isinstance(source, Node) and is_constant(source):
            path = str(source.target)
            put_tensor(module, path, _without(tensor_at(module, path), gone))


def _without(value: Tensor, gone: set[int]) -> Tensor:
    return value.detach()[[c for c in range(len(value)) if c not in gone]].clone()
