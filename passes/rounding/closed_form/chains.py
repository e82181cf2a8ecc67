"""Pairs of weighted ops between which channels may be scaled without changing what the network computes.

`f(s x) = s f(x)` for s > 0 holds for ReLU, pooling, zero padding and reshapes: a factor on a layer's channel can be
divided out of the next layer's weights (arXiv 1906.04721, section 4.1). Where the ops in between move each channel is
probed: the output of the first op is replaced by channel codes, which are read at the input of the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.core.ir import OpRule, Program, is_constant, rule_of, shape_of
from fxquant.core.run import CalibrationSet, Environment, GraphReplay
from fxquant.passes.rounding.closed_form.input_gram import channel_axis, geometry_of

CODE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class ScaleChain:
    """Two weighted ops, the second of which is the only reader of the first.

    Args:
        first: node name of the op whose output channels are scaled.
        second: node name of the op whose weights undo the scale.
        between: names of the values from the first op's output up to the second's input, in order.
        channels: the first op's output channel that each element of the second's weight meets, -1 where it meets none;
            shape of the second's weight.
    """

    first: str
    second: str
    between: tuple[str, ...]
    channels: Tensor


def scale_chains(program: Program, images: CalibrationSet) -> tuple[list[ScaleChain], dict[str, str]]:
    """Return the chains of a network in graph order, and for every other weighted op why it begins none.

    Args:
        program: float network.
        images: one of them is run, to see where channels go.
    """
    replay = GraphReplay(program.module)
    base = None
    chains: list[ScaleChain] = []
    refusals: dict[str, str] = {}
    for node in program.module.graph.nodes:
        rule = rule_of(node)
        if rule is None or rule.weight is None:
            continue
        path = _unfit(node, rule) or _path(node)
        if isinstance(path, str):
            refusals[node.name] = path
            continue
        with torch.no_grad():
            base = base or replay.forward(images.slice(0, 1).inputs)[1]
            rising, falling = (_probe(replay, base, path, fall) for fall in (False, True))
        if not torch.equal(rising, falling) or bool((rising < -1).any()):
            refusals[node.name] = f"channels of {node.name!r} do not stay apart on the way to {path[-1].name!r}"
        else:
            chains.append(ScaleChain(node.name, path[-1].name, tuple(step.name for step in path[:-1]), rising))
    return chains, refusals


def _unfit(node: Node, rule: OpRule) -> str | None:
    """Return why a weighted op's parameters cannot be scaled, None if they can."""
    assert rule.weight is not None
    weight = node.args[rule.weight]
    bias = node.args[rule.bias] if rule.bias is not None and len(node.args) > rule.bias else None
    if not isinstance(weight, Node) or not is_constant(weight) or not (bias is None or is_constant(bias)):
        return f"parameters of {node.name!r} are computed by the graph"
    paths = [source.target for source in (weight, bias) if isinstance(source, Node)]
    holders = [other for other in node.graph.nodes if other.op == "get_attr" and other.target in paths]
    if sum(len(holder.users) for holder in holders) != len(paths):
        return f"parameters of {node.name!r} are shared"
    return None


def _path(node: Node) -> list[Node] | str:
    """Return the nodes from a weighted op to the next one if that is its only reader, or why there is none."""
    path = [node]
    while True:
        value = path[-1]
        users = [user for user in value.users if not isinstance(user.meta.get("val"), int | torch.SymInt)]
        if len(users) != 1:
            return f"value {value.name!r} has {len(users)} readers"
        user, rule = users[0], rule_of(users[0])
        path.append(user)
        if rule is not None and rule.weight is not None and user.args[0] is value:
            return _unfit(user, rule) or path
        if user.op == "output":
            return f"value {value.name!r} is an answer of the network"
        if rule is None or not rule.passes_factor:
            kind = "no row of the op table" if rule is None else rule.kind
            return f"{user.name!r} ({kind}) {(rule or OpRule).unscalable}"


def _probe(replay: GraphReplay, base: Environment, path: list[Node], falling: bool) -> Tensor:
    """Return the channel each weight element of the last op meets, of the weight's shape; -1 for none, -2 for several.

    Codes are exponentials of evenly spaced numbers, rising or falling: a mean of several channels is no code, and a
    maximum over several is another channel's when they fall.
    """
    first, last = path[0], path[-1]
    shape = base[first].shape
    axis = channel_axis(len(shape), first)
    rising = torch.exp(torch.arange(1, shape[axis] + 1) / shape[axis]).to(base[first])
    codes = rising.flip(0) if falling else rising
    coded = codes.reshape([-1] + [1] * (len(shape) - 1 - axis)).expand(shape)
    source = last.args[0]
    assert isinstance(source, Node)
    _, after = replay.replay(base, {first.name: lambda _: coded}, keep=True)
    read = after[source].movedim(channel_axis(after[source].dim(), last), 0).flatten(1)
    # Padding reads as zero; every other element of a channel must hold the channel's code.
    value = read.amax(dim=1)
    alone = ((read - value.unsqueeze(1)).abs() <= CODE_TOLERANCE) | (read == 0)
    distance, channel = (value.unsqueeze(1) - codes.unsqueeze(0)).abs().min(dim=1)
    channel = torch.where(alone.all(dim=1) & (distance <= CODE_TOLERANCE), channel, -2)
    return _met_by(last, torch.where(value == 0, -1, channel))


def _met_by(node: Node, channel: Tensor) -> Tensor:
    """Return the values of the input channels, spread over the elements of the weight that multiply them."""
    rule = rule_of(node)
    assert rule is not None
    assert rule.weight is not None
    shape, groups = shape_of(node.args[rule.weight]), geometry_of(node).groups
    met = channel.reshape(groups, 1, shape[1]).expand(groups, shape[0] // groups, shape[1]).reshape(shape[0], shape[1])
    return met.reshape([*met.shape] + [1] * (len(shape) - 2)).expand(shape)
