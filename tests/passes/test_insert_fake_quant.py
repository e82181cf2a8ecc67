from __future__ import annotations

import pytest
import torch

from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, FakeQuantNodes, WeightGrids
from fxquant.core.ir import (
    FLOAT,
    Choice,
    EdgeGroups,
    FakeQuantize,
    Program,
    Sites,
    WeightFormat,
    resolve,
    rule_of,
    show,
    tensor_at,
)
from fxquant.core.run import first_tensor
from fxquant.passes import FindSites, InsertFakeQuant, group_bits
from tests.models import MODELS
from tests.programs import TARGET, calibrated, check_pass, tied, uniform

NETS = ["residual", "separable", "shared", "padded", "concat", "two_inputs", "attention", "tokens", "name_clash"]


def simulated(name: str, bits: int = 8) -> Program:
    program = calibrated(name)
    return check_pass(InsertFakeQuant(), program.with_facts(BitAllocation(uniform(program, bits))))


def fakes(program: Program) -> dict[str, FakeQuantize]:
    modules = {
        n.name: program.module.get_submodule(str(n.target)) for n in program.module.graph.nodes if n.op == "call_module"
    }
    return {name: module for name, module in modules.items() if isinstance(module, FakeQuantize)}


def test_the_simulated_graph() -> None:
    assert show(simulated("tokens").module) == (
        "quantize_fc_weight = FakeQuantize(fc.weight)\n"
        "ids = ids()\n"
        "quantize_out_weight = FakeQuantize(out.weight)\n"
        "embedding = embedding.default(quantize_out_weight, ids)\n"
        "mean = mean.dim(embedding)\n"
        "quantize_mean = FakeQuantize(mean)\n"
        "linear = linear.default(quantize_mean, quantize_fc_weight, fc.bias)\n"
        "relu = relu.default(linear)\n"
        "quantize_relu = FakeQuantize(relu)\n"
        "linear_1 = linear.default(quantize_relu, quantize_out_weight)\n"
        "return linear_1"
    )


@pytest.mark.parametrize("name", NETS)
def test_eight_bits_are_close_to_float_and_two_are_not(name: str) -> None:
    inputs = MODELS[name].inputs(4)
    with torch.no_grad():
        reference = first_tensor(tied(name).module(*inputs))
        errors = [float((first_tensor(simulated(name, b).module(*inputs)) - reference).square().mean()) for b in (8, 2)]
    # Calibrated on 8 images only, so that clipping counts for some of the error at 8 bits.
    assert errors[0] < 0.02 * float(reference.square().mean())
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", NETS)
def test_nodes_stand_where_the_fact_says(name: str) -> None:
    program = simulated(name, 4)
    nodes, modules = program[FakeQuantNodes], fakes(program)
    listed = [n for names in (*nodes.weights.values(), *nodes.activations.values()) for n in names]
    assert sorted(listed) == sorted(modules)
    assert program.log[-1].rewrites == len(modules)
    for site in program[Sites].sites:
        grid = program[WeightGrids].at(site.name, WeightFormat(4))
        for node in nodes.weights[site.name]:
            assert torch.equal(modules[node].scale, grid.scale), "each weight has its own scales"
        for reader in site.nodes:
            operand = resolve(program.module.graph, reader).args[1]
            assert str(operand) in nodes.weights[site.name]
            assert str(resolve(program.module.graph, reader).args[0]) in nodes.inputs[site.name]
    for group, producers in program[EdgeGroups].producers.items():
        scales = {float(modules[node].scale) for node in nodes.activations[group]}
        assert len(scales) == 1, "a group has one grid"
        assert len(nodes.activations[group]) == len(producers)


def test_bits_of_groups() -> None:
    program = FindSites(TARGET, bits=(4, 8), activation_bits=(4, 8))(tied("shared"))
    groups, sites = program[EdgeGroups], program[Sites]
    conv, linear = sites.sites
    bits = group_bits(groups, sites, {conv.name: Choice(4, 4), linear.name: Choice(8, 8)}, 8)
    assert (bits["x"], bits["relu"], bits["amax"], bits["sigmoid"]) == (4, 4, 8, 8)
    assert bits["conv2d"] == 8, "nothing reads it, the default holds"


def test_sites_that_read_one_value_must_agree() -> None:
    program = FindSites(TARGET, bits=(8,), activation_bits=(4, 8))(tied("concat"))
    choices = uniform(program, 8) | {"left": Choice(8, 4)}
    with pytest.raises(OptionError, match=r"sites 'left' and 'right' read one value .* not 4 and 8"):
        group_bits(program[EdgeGroups], program[Sites], choices, 8)


def test_plans_that_do_not_fit_the_model() -> None:
    program = calibrated("residual")
    plan = uniform(program, 8)
    for choices in ({k: v for k, v in plan.items() if k != "fc"}, plan | {"fc": FLOAT}):
        with pytest.raises(OptionError, match="gives no integer precision to fc; name every site"):
            InsertFakeQuant()(program.with_facts(BitAllocation(choices)))
    with pytest.raises(OptionError, match="'fc' has no 3-bit grid"):
        InsertFakeQuant()(program.with_facts(BitAllocation(plan | {"fc": Choice(3, 8)})))


def test_a_quantized_answer_is_quantized_for_the_caller_too() -> None:
    program = simulated("two_inputs", 8)
    with torch.no_grad():
        features = program.module(*MODELS["two_inputs"].inputs(2))["features"]
    assert len(features.unique()) <= 256
    assert show(program.module).splitlines()[-1] == "return mean, quantize_conv2d"


@pytest.mark.parametrize("name", ["residual", "shared", "padded"])
def test_biases_lie_on_the_step_of_the_accumulator(name: str) -> None:
    before, after = calibrated(name).module, simulated(name).module
    checked = 0
    for node in after.graph.nodes:
        rule = rule_of(node)
        if rule is None or rule.bias is None or len(node.args) <= rule.bias:
            continue
        source, weight, bias = (str(getattr(operand, "target", "")) for operand in node.args[:3])
        step = tensor_at(after, f"{source}.scale") * tensor_at(after, f"{weight}.scale")
        integers = tensor_at(after, bias) / step
        assert torch.allclose(integers, integers.round(), rtol=1e-5, atol=1e-3)
        float_bias = resolve(before.graph, node.name).args[rule.bias]
        moved = (tensor_at(after, bias) - tensor_at(before, str(getattr(float_bias, "target", "")))).abs()
        assert (moved <= 0.5001 * step).all()
        assert moved.max() > 0
        checked += 1
    assert checked > 0
