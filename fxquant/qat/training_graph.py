"""A trainable copy of a simulated graph, and the trained values as facts of a program."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, FakeQuantNodes, Rounding
from fxquant.core.ir import (
    Choice,
    FakeQuantize,
    Grid,
    Program,
    Site,
    Sites,
    fork,
    put_tensor,
    resolve,
    rule_of,
    tensor_at,
)
from fxquant.passes import simulate

METHOD = "trained"


@dataclass(frozen=True)
class TrainedValues:
    """Trained tensors outside the quantized layers: norms and their statistics, tables, layers in float.

    They belong to the simulated graph of one plan; the float graph, the reference of losses, keeps the model's tensors.

    Args:
        choices: the plan they were trained with.
        values: attribute path -> tensor.
    """

    choices: dict[str, Choice]
    values: dict[str, Tensor]


def trainable(simulated: Program, learn_steps: bool = True) -> GraphModule:
    """Return a deep copy of a simulated graph in which everything that can be trained is a parameter.

    Args:
        simulated: the graph with its quantizers; the copy shares nothing with it.
        learn_steps: make the quantizers' scales parameters too, one for all quantizers of a group.
    """
    module = fork(simulated.module)
    known: dict[int, object] = {}
    for path in {str(node.target): None for node in module.graph.nodes if node.op in ("get_attr", "call_module")}:
        holder, leaf = _place(module, path)
        # The memo is common to all paths, so that a tensor at several paths stays one tensor.
        setattr(holder, leaf, copy.deepcopy(getattr(holder, leaf), known))
    for _, path in _site_tensors(simulated, module):
        holder, leaf = _place(module, path)
        if not isinstance(getattr(holder, leaf), nn.Parameter):
            value = tensor_at(module, path)
            delattr(holder, leaf)
            setattr(holder, leaf, nn.Parameter(value))
    for parameter in module.parameters():
        parameter.grad = None
        parameter.requires_grad_(parameter.is_floating_point())
    if learn_steps:
        for names in (*simulated[FakeQuantNodes].weights.values(), *simulated[FakeQuantNodes].activations.values()):
            quantizers = [_quantizer(module, name) for name in names]
            for quantizer in dict.fromkeys(quantizers):
                quantizer.learn()
                # Values of one group are inputs of one kernel, which has one grid.
                quantizer.scale = quantizers[0].scale
    return module


def gather(simulated: Program, module: GraphModule) -> tuple[Rounding, TrainedValues]:
    """Return what training changed: weights, biases and grids of sites; and all other tensors.

    Weights are kept unrounded, so that training can go on. The trained graph and the backends use the nearest values of
    the learned grid.

    Args:
        simulated: the argument of `trainable`.
        module: its result after training.

    Raises:
        OptionError: the module is no copy of this graph, or has a value or step that cannot be used.
    """
    _check_alike(simulated.module, module)
    nodes, before = simulated[FakeQuantNodes], Rounding.of(simulated, simulated[BitAllocation].choices)
    with torch.no_grad():
        grids = {name: _grid(module, names) for name, names in nodes.weights.items()}
        activations: dict[str, Grid] = {}
        for group, names in nodes.activations.items():
            found = [_grid(module, (name,)) for name in names]
            if any(not torch.equal(each.scale, found[0].scale) for each in found):
                raise OptionError(
                    f"the quantizers {', '.join(names)} must share one step and have several; "
                    "train the module of trainable()"
                )
            activations[group] = found[0]
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        for (kind, name), path in _site_tensors(simulated, module):
            (weights if kind == "weight" else biases)[name] = _finite(module, path)
        others = {path: _finite(module, path) for path in _other_paths(simulated, module)}
    changed = {
        path: value for path, value in others.items() if not torch.equal(value, tensor_at(simulated.module, path))
    }
    methods = [method for method in before.method.split("+") if method not in ("nearest", METHOD)]
    choices = simulated[BitAllocation].choices
    rounding = replace(
        before,
        method="+".join([*methods, METHOD]),
        weights=weights,
        grids=grids,
        biases=biases,
        activations=activations,
    )
    known = simulated.facts.get(TrainedValues)
    earlier = known.values if known is not None and known.choices == choices else {}
    return rounding, TrainedValues(choices, {**earlier, **changed})


def simulated_plan(program: Program) -> Program:
    """Return the simulated graph of a program's plan, with what was trained for it outside of the quantized layers."""
    simulated, trained = simulate(program, program[BitAllocation]), program.facts.get(TrainedValues)
    holds = trained is not None and trained.choices == program[BitAllocation].choices
    return with_values(simulated, trained.values) if trained is not None and holds else simulated


def with_values(program: Program, values: Mapping[str, Tensor]) -> Program:
    """Return the program with other tensors at some attribute paths.

    Raises:
        OptionError: a tensor does not fit what is at its path.
        PipelineError: there is nothing at a path.
    """
    module = fork(program.module)
    for path, value in values.items():
        old = tensor_at(module, path)
        if old.shape != value.shape or old.dtype != value.dtype:
            raise OptionError(
                f"{path} holds {tuple(old.shape)} of {old.dtype}, not {tuple(value.shape)} of {value.dtype}; "
                "give values of this model"
            )
        put_tensor(module, path, value.detach().to(old.device).clone())
    return Program(module, program.facts, program.log)


def _place(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    parents, _, leaf = path.rpartition(".")
    return module.get_submodule(parents), leaf


def _quantizer(module: GraphModule, name: str) -> FakeQuantize:
    found = module.get_submodule(str(resolve(module.graph, name).target))
    assert isinstance(found, FakeQuantize)
    return found


def _site_tensors(simulated: Program, module: GraphModule) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield ("weight", site) or ("bias", op node) with the path of its tensor, for every site."""
    for site in simulated[Sites].sites:
        for name in simulated[FakeQuantNodes].weights[site.name]:
            holder = resolve(module.graph, name).args[0]
            assert isinstance(holder, Node)
            yield ("weight", site.name), str(holder.target)
        for node, bias in _biases(module, site):
            yield ("bias", node), str(bias.target)


def _biases(module: GraphModule, site: Site) -> Iterator[tuple[str, Node]]:
    for node in (resolve(module.graph, name) for name in site.nodes):
        rule = rule_of(node)
        if rule is not None and rule.bias is not None and len(node.args) > rule.bias:
            bias = node.args[rule.bias]
            if isinstance(bias, Node) and bias.op == "get_attr":
                yield node.name, bias


def _other_paths(simulated: Program, module: GraphModule) -> list[str]:
    """Return the paths that are read by anything other than a site's weight quantizer or as a site's bias."""
    quantizers = {name for names in simulated[FakeQuantNodes].weights.values() for name in names}
    biases = {(name, bias) for site in simulated[Sites].sites for name, bias in _biases(module, site)}
    return sorted(
        {
            str(node.target)
            for node in module.graph.nodes
            if node.op == "get_attr"
            for user in node.users
            if user.name not in quantizers and (user.name, node) not in biases
        }
    )


def _check_alike(simulated: GraphModule, module: GraphModule) -> None:
    if not isinstance(module, GraphModule):
        raise OptionError(f"a {type(module).__name__} is no copy of the result's graph; give the module of trainable()")
    for one, other in zip_longest(_descriptions(simulated), _descriptions(module), fillvalue="nothing"):
        if one != other:
            raise OptionError(
                f"the module has {other} where this result has {one}; give the module of trainable() of this result "
                "and plan"
            )


def _descriptions(module: GraphModule) -> list[str]:
    """Return one line per node: its op, with the precision of quantizers and the shape of constants."""
    lines = []
    for node in module.graph.nodes:
        detail = str(node.target)
        if node.op == "get_attr":
            detail += f" of shape {tuple(tensor_at(module, str(node.target)).shape)}"
        elif node.op == "call_module":
            detail += f" with {module.get_submodule(str(node.target)).extra_repr()}"
        lines.append(f"{node.name} = {detail}")
    return lines


def _finite(module: GraphModule, path: str) -> Tensor:
    value = tensor_at(module, path).detach().clone()
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise OptionError(f"{path!r} has values that are not finite after training; train with a lower learning rate")
    return value


def _grid(module: GraphModule, names: tuple[str, ...]) -> Grid:
    quantizer = _quantizer(module, names[0])
    grid = quantizer.grid
    scale = grid.scale
    usable = torch.isfinite(scale) & (scale > 0)
    if not usable.all():
        worst = scale[~usable][0]
        raise OptionError(
            f"the step of {names[0]!r} is {float(worst):g}; steps must be finite and above 0: train with lower step_lr"
        )
    return grid
