"""Copies to train, and what comes back of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant import Budget, Result, flow
from fxquant.backends import to_qdq
from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.facts import FakeQuantNodes, Rounding
from fxquant.core.ir import FINEST_SHARE, Choice, FakeQuantize, Program, Sites, resolve, tensor_at
from fxquant.core.run import first_tensor, model_outputs
from fxquant.passes import ScaleWeights
from fxquant.qat import TrainedValues, put_tensor, reestimate, with_values
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


def jolt(module: GraphModule, strength: float = 0.1) -> None:
    """Move every parameter a little, as training might."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + strength * (torch.rand(parameter.shape, generator=generator) - 0.5))


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


def test_steps_are_parameters_only_if_asked() -> None:
    quantizers = [m for m in plain().trainable(learn_steps=False).modules() if isinstance(m, FakeQuantize)]
    assert quantizers
    assert not any(isinstance(quantizer.scale, nn.Parameter) for quantizer in quantizers)
    quantizers = [m for m in plain().trainable().modules() if isinstance(m, FakeQuantize)]
    assert all(isinstance(quantizer.scale, nn.Parameter) for quantizer in quantizers)


def test_quantizers_of_a_group_share_one_step() -> None:
    result = quantized("concat")
    module = result.trainable()
    groups = result.simulated_program[FakeQuantNodes].activations.values()
    assert any(len(names) > 1 for names in groups)
    for names in groups:
        quantizers = [module.get_submodule(str(resolve(module.graph, name).target)) for name in names]
        assert len({id(quantizer.scale) for quantizer in quantizers}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_result_answers_as_its_copy(name: str, tmp_path: Path) -> None:
    result, batch = quantized(name), MODELS[name].inputs(8)
    before = snapshot(result.program), model_outputs(result.simulated, batch)
    module = result.trainable()
    jolt(module)
    count = reestimate(module, [batch])
    assert count == {"shared": 2, "concat": 1}.get(name, 0)
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
    module = result.trainable()
    jolt(module)
    trained = result.with_trained(module)
    qdq = to_qdq(trained.simulated)
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
    module = result.trainable()
    jolt(module, 0.3)
    trained = result.with_trained(module)
    simulated = model_outputs(trained.simulated, (images,))
    run = executable(trained.to_onnx(tmp_path / "model.onnx").path.read_bytes())
    span = float(simulated.max() - simulated.min())
    for lowered in (first_tensor(trained.lowered(images)), run((images,))):
        assert float((lowered - simulated).abs().max()) < 0.02 * span
    assert float((model_outputs(result.simulated, (images,)) - simulated).abs().max()) > 0.05 * span


def test_training_goes_on_where_it_stopped() -> None:
    result, images = plain(), inputs("plain", 24)[0]
    module = result.trainable()
    jolt(module)
    once = result.with_trained(module)
    site = result.program[Sites].sites[0]
    assert torch.equal(tensor_at(once.trainable(), site.weight), tensor_at(module, site.weight))
    twice = once.with_trained(once.trainable())
    assert twice.program[Rounding].method == "trained"
    assert torch.equal(model_outputs(twice.simulated, (images,)), model_outputs(once.simulated, (images,)))


def test_values_outside_of_layers_survive_a_second_training() -> None:
    result, batch = quantized("concat"), MODELS["concat"].inputs(8)
    module = result.trainable()
    assert reestimate(module, [batch]) == 1
    once = result.with_trained(module)
    assert set(once.program[TrainedValues].values) == {"norm.running_mean", "norm.running_var"}
    assert not torch.equal(model_outputs(once.simulated, batch), model_outputs(result.simulated, batch))
    twice = once.with_trained(once.trainable())
    assert torch.equal(model_outputs(twice.simulated, batch), model_outputs(once.simulated, batch))


def test_another_plan_knows_nothing_of_the_training() -> None:
    result, batch = quantized("concat"), MODELS["concat"].inputs(8)
    module = result.trainable()
    jolt(module)
    reestimate(module, [batch])
    trained = result.with_trained(module)
    plan = fxquant.BitAllocation({site.name: Choice(4, 8) for site in result.program[Sites].sites})
    one, other = (model_outputs(each.with_plan(plan).simulated, batch) for each in (result, trained))
    assert torch.equal(one, other)


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
    result = plain()
    for path in ("conv2.weight", "fc.bias"):
        module = result.trainable()
        with torch.no_grad():
            tensor_at(module, path).view(-1)[1] = torch.nan
        with pytest.raises(OptionError, match=rf"'{path}' that are not finite; train again"):
            result.with_trained(module)
    weight = next(iter(result.simulated_program[FakeQuantNodes].weights.values()))[0]
    activation = next(iter(result.simulated_program[FakeQuantNodes].activations.values()))[0]
    for name in (weight, activation):
        for value in (torch.inf, torch.nan, 0.0, -2.0):
            module = result.trainable(learn_steps=False)
            with torch.no_grad():
                tensor_at(module, f"{name}.scale").view(-1)[0] = value
            with pytest.raises(OptionError, match=rf"the step of '{name}' is {value:g}; .* above 0"):
                result.with_trained(module)


def test_refusals_of_modules() -> None:
    result = plain()
    other = fxquant.BitAllocation({site.name: Choice(2, 8) for site in result.program[Sites].sites})
    with pytest.raises(OptionError, match=r"has quantize_\S+ = .*bits=2.* where this result has .*bits="):
        result.with_trained(result.with_plan(other).trainable())
    with pytest.raises(OptionError, match="trainable"):
        result.with_trained(quantized("residual").trainable())
    with pytest.raises(OptionError, match=r"where this result has|nodes"):
        result.with_trained(result.program.module)
    bare: object = plain_net()
    assert isinstance(bare, nn.Module)
    with pytest.raises(OptionError, match="a PlainNet is not a trained copy"):
        Result.with_trained.__get__(result)(bare)


def test_refusal_of_a_group_torn_apart() -> None:
    result = quantized("concat")
    module = result.trainable(learn_steps=False)
    names = next(n for n in result.simulated_program[FakeQuantNodes].activations.values() if len(n) > 1)
    with torch.no_grad():
        tensor_at(module, f"{names[0]}.scale").mul_(2)
    with pytest.raises(OptionError, match="must share one step"):
        result.with_trained(module)


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
    module = made.module
    put_tensor(module, "norm.bias", torch.ones(8))
    assert not torch.equal(tensor_at(program.module, "norm.bias"), tensor_at(module, "norm.bias"))


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
