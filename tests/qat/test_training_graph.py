"""Trainable copies, and results made from them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant import Budget, Result, flow
from fxquant.backends import to_qdq
from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.facts import FakeQuantNodes, Rounding
from fxquant.core.ir import FINEST_SHARE, Choice, FakeQuantize, Program, Sites, fork, put_tensor, resolve, tensor_at
from fxquant.core.run import first_tensor, model_outputs
from fxquant.passes import ScaleWeights
from fxquant.qat import TrainedValues, reestimate, with_values
from tests.models import MODELS, built
from tests.scoring import inputs, plain_net

NAMES = ["residual", "shared", "concat", "tokens", "functional", "attention", "name_clash"]
"""Networks with a residual, a weight used twice, a batch norm that stays, a shared table, computed biases, norms."""


@cache
def quantized(name: str) -> Result:
    return fxquant.quantize(
        built(name), [MODELS[name].inputs(12)], Budget(average_bits=5), target="reference", effort="fast"
    )


@cache
def plain() -> Result:
    return fxquant.quantize(
        plain_net(), inputs("plain", 24)[0], Budget(average_bits=4.5), target="onnxruntime", effort="fast"
    )


def jolted(result: Result, strength: float = 0.1) -> GraphModule:
    """Return a copy whose parameters have moved a little, as in training."""
    module, generator = result.trainable(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + strength * (torch.rand(parameter.shape, generator=generator) - 0.5))
    return module


def snapshot(program: Program) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in program.module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def take_biases(module: GraphModule, result: Result) -> None:
    """Give a copy the rounded biases of a result."""
    for site in result.program[Sites].sites:
        for name in site.nodes:
            nodes = (resolve(each.graph, name) for each in (module, result.simulated))
            mine, theirs = (node.args[2] if len(node.args) > 2 else None for node in nodes)
            if getattr(mine, "op", "") == "get_attr":
                value = tensor_at(result.simulated, str(getattr(theirs, "target", "")))
                with torch.no_grad():
                    tensor_at(module, str(getattr(mine, "target", ""))).copy_(value)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_answers_alike_and_shares_nothing(name: str) -> None:
    result, batch = quantized(name), MODELS[name].inputs(8)
    known = snapshot(result.program), snapshot(result.simulated_program)
    module = result.trainable()
    assert torch.equal(model_outputs(module, batch), model_outputs(result.simulated, batch))
    assert set(module.state_dict()) == set(result.simulated.state_dict())
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.mul_(0)
    assert same(known[0], snapshot(result.program))
    assert same(known[1], snapshot(result.simulated_program))


@pytest.mark.parametrize("name", NAMES)
def test_everything_takes_a_gradient(name: str) -> None:
    module = quantized(name).trainable()
    answer = module(*MODELS[name].inputs(4))
    leaves = [t for t in torch.utils._pytree.tree_leaves(answer) if isinstance(t, Tensor)]
    torch.autograd.backward(sum((leaf.square().sum() for leaf in leaves), torch.zeros(())))
    assert [path for path, p in module.named_parameters() if p.grad is None] == []
    for site in quantized(name).program[Sites].sites:
        for quantizer in quantized(name).simulated_program[FakeQuantNodes].weights[site.name]:
            weight = resolve(module.graph, quantizer).args[0]
            assert isinstance(tensor_at(module, str(getattr(weight, "target", ""))), nn.Parameter)


def test_steps_are_parameters_only_if_asked_for_and_one_for_each_group() -> None:
    result = quantized("concat")
    groups = result.simulated_program[FakeQuantNodes].activations.values()
    assert any(len(names) > 1 for names in groups)
    for learn_steps in (False, True):
        module = result.trainable(learn_steps)
        for names in groups:
            quantizers = [module.get_submodule(str(resolve(module.graph, name).target)) for name in names]
            assert all(isinstance(quantizer.scale, nn.Parameter) == learn_steps for quantizer in quantizers)
            assert not learn_steps or len({id(quantizer.scale) for quantizer in quantizers}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_result_answers_as_its_copy(name: str, tmp_path: Path) -> None:
    result, batch = quantized(name), MODELS[name].inputs(8)
    before = snapshot(result.program), model_outputs(result.simulated, batch)
    module = jolted(result)
    assert reestimate(module, [batch]) == {"shared": 2, "concat": 1}.get(name, 0)
    trained = result.with_trained(module)
    assert trained.program[Rounding].method == "trained"
    assert not torch.equal(model_outputs(module, batch), before[1])
    rough = model_outputs(trained.simulated, batch)
    torch.testing.assert_close(rough, model_outputs(module, batch), rtol=0.1, atol=0.1 * float(rough.abs().max()))
    assert torch.equal(model_outputs(result.simulated, batch), before[1])
    assert same(snapshot(result.program), before[0])
    assert same(snapshot(trained.program), before[0])
    again = fxquant.load(trained.save(tmp_path))
    assert torch.equal(model_outputs(again.simulated, batch), rough)
    assert again.program[TrainedValues].values.keys() == trained.program[TrainedValues].values.keys()
    assert again.allocation.measured_loss == trained.allocation.measured_loss != result.allocation.measured_loss
    # What is left between the two is the rounding of biases alone.
    take_biases(module, trained)
    assert torch.equal(model_outputs(module, batch), rough)


def test_lowered_integers_are_what_the_copy_computes() -> None:
    result = plain()
    module = jolted(result)
    qdq = to_qdq(result.with_trained(module).simulated)
    for site in result.program[Sites].sites:
        name = result.simulated_program[FakeQuantNodes].weights[site.name][0]
        quantizer = module.get_submodule(name)
        assert isinstance(quantizer, FakeQuantize)
        with torch.no_grad():
            step = quantizer.step.reshape(-1, *[1] * (tensor_at(module, site.weight).dim() - 1))
            expected = torch.round(quantizer(tensor_at(module, site.weight)) / step)
        assert torch.equal(tensor_at(qdq, f"{site.weight}_q").float(), expected)


def test_a_trained_result_lowers_and_exports(tmp_path: Path) -> None:
    from fxquant.backends.onnx import executable

    result, images = plain(), inputs("plain", 24)[0]
    trained = result.with_trained(jolted(result, 0.3))
    simulated = model_outputs(trained.simulated, (images,))
    run = executable(trained.to_onnx(tmp_path / "model.onnx").path.read_bytes())
    span = float(simulated.max() - simulated.min())
    for lowered in (first_tensor(fxquant.lower(trained, "fx_int8")(images)), run((images,))):
        assert float((lowered - simulated).abs().max()) < 0.02 * span
    assert float((model_outputs(result.simulated, (images,)) - simulated).abs().max()) > 0.05 * span


def test_training_goes_on_where_it_stopped() -> None:
    result, images = plain(), inputs("plain", 24)[0]
    module = jolted(result)
    once = result.with_trained(module)
    site = result.program[Sites].sites[0]
    assert torch.equal(tensor_at(once.trainable(), site.weight), tensor_at(module, site.weight))
    twice = once.with_trained(once.trainable())
    assert twice.program[Rounding].method == "trained"
    assert torch.equal(model_outputs(twice.simulated, (images,)), model_outputs(once.simulated, (images,)))


def test_values_outside_of_layers_survive_a_second_training_but_not_another_plan() -> None:
    result, batch = quantized("concat"), MODELS["concat"].inputs(8)
    module = result.trainable()
    assert reestimate(module, [batch]) == 1
    once = result.with_trained(module)
    assert set(once.program[TrainedValues].values) == {"norm.running_mean", "norm.running_var"}
    twice = once.with_trained(once.trainable())
    plan = fxquant.BitAllocation({site.name: Choice(4, 8) for site in result.program[Sites].sites})
    mine, first, second, *other = (
        model_outputs(each.simulated, batch)
        for each in (result, once, twice, result.with_plan(plan), once.with_plan(plan))
    )
    assert not torch.equal(first, mine)
    assert torch.equal(second, first)
    assert torch.equal(*other)


def test_a_step_that_overshot_counts_as_the_finest() -> None:
    result, images = plain(), inputs("plain", 24)[0]
    module = result.trainable()
    name = next(iter(result.simulated_program[FakeQuantNodes].weights.values()))[0]
    quantizer = module.get_submodule(name)
    assert isinstance(quantizer, FakeQuantize)
    first = float(quantizer.scale.detach()[0])
    with torch.no_grad():
        quantizer.scale[0] = -1.0
    trained = result.with_trained(module)
    site = result.program[Sites].sites[0].name
    assert float(trained.program[Rounding].grids[site].scale[0]) == first * FINEST_SHARE
    assert torch.isfinite(model_outputs(trained.simulated, (images,))).all()


def test_refusals_of_values() -> None:
    result, nodes = plain(), plain().simulated_program[FakeQuantNodes]
    steps = [next(iter(names.values()))[0] for names in (nodes.weights, nodes.activations)]
    cases = [
        (path, torch.nan, f"'{path}' has values that are not finite after") for path in ("conv2.weight", "fc.bias")
    ]
    for value in (torch.inf, torch.nan, 0.0, -2.0):
        cases += [(f"{name}.scale", value, f"the step of '{name}' is {value:g}; .* above 0") for name in steps]
    for path, value, message in cases:
        module = result.trainable(learn_steps=False)
        with torch.no_grad():
            tensor_at(module, path).view(-1)[0] = value
        with pytest.raises(OptionError, match=message):
            result.with_trained(module)


def test_refusals_of_modules() -> None:
    result, other = plain(), quantized("concat")
    two = fxquant.BitAllocation({site.name: Choice.parse("W2cA8") for site in result.program[Sites].sites})
    torn = other.trainable(learn_steps=False)
    names = next(n for n in other.simulated_program[FakeQuantNodes].activations.values() if len(n) > 1)
    with torch.no_grad():
        tensor_at(torn, f"{names[0]}.scale").mul_(2)
    longer = fork(result.trainable())
    longer.graph.call_function(torch.relu, (next(iter(longer.graph.nodes)),))
    bare: Any = plain_net()
    for quantized_by, module, message in (
        (result, result.with_plan(two).trainable(), r"has quantize_\S+ = .*bits=8.* where this result has .*bits="),
        (result, quantized("residual").trainable(), "trainable"),
        (result, result.program.module, "where this result has"),
        (result, longer, "the module has relu.* where this result has nothing"),
        (result, bare, "a PlainNet is no copy"),
        (other, torn, "must share one step"),
    ):
        with pytest.raises(OptionError, match=message):
            quantized_by.with_trained(module)


def test_values_go_to_a_graph_of_their_own() -> None:
    program = quantized("concat").program
    known = snapshot(program)
    made = with_values(program, {"norm.running_mean": torch.full((8,), 3.0), "norm.weight": torch.zeros(8)})
    assert same(snapshot(program), known)
    assert float(tensor_at(made.module, "norm.running_mean").mean()) == 3.0
    assert isinstance(tensor_at(made.module, "norm.weight"), nn.Parameter)
    for wrong in (torch.zeros(7), torch.zeros(8, dtype=torch.float64)):
        with pytest.raises(OptionError, match=r"norm.weight holds \(8,\) of torch.float32"):
            with_values(program, {"norm.weight": wrong})
    put_tensor(made.module, "norm.bias", torch.ones(8))
    assert same(snapshot(program), known)


def test_parameters_of_a_rounding_are_put_back(tmp_path: Path) -> None:
    result, images = plain(), inputs("plain", 24)[0]
    values = {"conv2.weight": tensor_at(result.program.module, "conv2.weight").detach() * 2}
    program = with_values(result.program, values)
    rounding = Rounding(result.allocation.choices, "equalized", parameters=values)
    known = Result(flow.run(program, ScaleWeights()).with_facts(rounding))
    folder = known.save(tmp_path)
    found = fxquant.load(folder)
    assert torch.equal(model_outputs(found.program.module, (images,)), model_outputs(program.module, (images,)))
    assert torch.equal(model_outputs(found.simulated, (images,)), model_outputs(known.simulated, (images,)))
    Rounding(rounding.choices, "equalized", parameters={"conv9.weight": torch.zeros(1)}).save(folder / "rounding.npz")
    with pytest.raises(FileFormatError, match=r"rounding\.npz belongs to another model"):
        fxquant.load(folder)
