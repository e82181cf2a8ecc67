"""Rates, a distillation step, statistics of batch norms; and the example script, with few steps."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import fxquant
from fxquant import Budget, Result
from fxquant.core.errors import CalibrationError, FailureError, OptionError
from fxquant.core.ir import FakeQuantize, tensor_at
from fxquant.core.run import model_outputs
from fxquant.qat import distill_step, parameter_groups, reestimate
from tests.models import MODELS, built
from tests.scoring import inputs, plain_net

ROOT = Path(__file__).parents[2]
IMAGES = inputs("plain", 24)[0]


@cache
def low_bit() -> Result:
    # Rounded to nearest there is most to gain.
    options = {"scoring_rounding": "nearest"}
    return fxquant.quantize(
        plain_net(), IMAGES, Budget(average_bits=2.5), target="reference", effort="fast", options=options
    )


@cache
def concat() -> Result:
    return fxquant.quantize(
        built("concat"), MODELS["concat"].inputs(8)[0], Budget(average_bits=8), target="reference", effort="fast"
    )


def test_groups_hold_every_parameter_once_at_its_rate() -> None:
    module = low_bit().trainable()
    groups = parameter_groups(module, 1e-3, 1e-2)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters())
    quantizers = {id(m.scale): m for m in module.modules() if isinstance(m, FakeQuantize)}
    for group in groups:
        (held_one,) = group["params"]
        size = held_one.detach().mean() if id(held_one) in quantizers else held_one.detach().square().mean().sqrt()
        rate = 1e-2 if id(held_one) in quantizers else 1e-3
        assert group["lr"] == pytest.approx(rate * float(size))
        assert ("weight_decay" in group) == (id(held_one) in quantizers)
    # Levels of codebooks are learned with the steps.
    learned = sum(id(p) in quantizers or name.endswith(".levels") for name, p in module.named_parameters())
    assert len(parameter_groups(low_bit().trainable(learn_steps=False), 1e-3, 1e-2)) == len(groups) - learned
    torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)


def test_frozen_parameters_are_left_out() -> None:
    module = low_bit().trainable()
    tensor_at(module, "conv1.weight").requires_grad_(False)
    for quantizer in (m for m in module.modules() if isinstance(m, FakeQuantize)):
        quantizer.scale.requires_grad_(False)
    left = [id(p) for group in parameter_groups(module, 1e-3, 1e-2) for p in group["params"]]
    assert sorted(left) == sorted(id(p) for p in module.parameters() if p.requires_grad)


def test_a_tensor_of_zeros_learns_like_the_others() -> None:
    sizes = (0.0, 1.0, 2.0, 4.0)
    module = nn.ParameterList([torch.full((3,), size) for size in sizes])
    rates = [group["lr"] for group in parameter_groups(module, 0.1, 0.1)]
    assert rates == pytest.approx([0.2, 0.1, 0.2, 0.4])


@pytest.mark.parametrize(
    ("trains", "weight_lr", "step_lr", "message"),
    [
        (True, -1.0, 0.1, "weight_lr is -1"),
        (True, 0.1, float("nan"), "step_lr is nan"),
        (False, 0.1, 0.1, "no parameter that requires a gradient"),
    ],
)
def test_what_makes_no_groups(trains: bool, weight_lr: float, step_lr: float, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parameter_groups(low_bit().trainable().requires_grad_(trains), weight_lr, step_lr)


@pytest.mark.parametrize("learn_steps", [True, False])
def test_distillation_improves_a_low_bit_plan(learn_steps: bool) -> None:
    result = low_bit()
    module, teacher = result.trainable(learn_steps), result.program.module
    optimizer = torch.optim.Adam(parameter_groups(module, 1e-3, 1e-3))
    losses = [distill_step(module, teacher, IMAGES, optimizer) for _ in range(40)]
    trained = result.with_trained(module)
    p, before, after = (
        F.log_softmax(model_outputs(m, (IMAGES,)).double(), 1) for m in (teacher, result.simulated, trained.simulated)
    )
    assert losses[0] == pytest.approx(float((p.exp() * (p - before)).sum(1).mean()), rel=1e-6)
    assert float((p.exp() * (p - after)).sum(1).mean()) < 0.5 * losses[0]
    assert trained.allocation.measured_loss is not None
    assert result.allocation.measured_loss is not None
    assert trained.allocation.measured_loss < result.allocation.measured_loss
    assert trained.allocation.choices == result.allocation.choices


def test_steps_learn_too() -> None:
    result = low_bit()
    module = result.trainable()
    optimizer = torch.optim.Adam(parameter_groups(module, 0.0, 1e-2))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    losses = [distill_step(module, result.program.module, IMAGES, optimizer) for _ in range(40)]
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.endswith(".scale")}
    assert min(losses) < 0.9 * losses[0]


def test_other_losses_and_several_inputs() -> None:
    batch = MODELS["two_inputs"].inputs(8)
    result = fxquant.quantize(built("two_inputs"), [batch], Budget(average_bits=4), target="reference", effort="fast")
    module, teacher = result.trainable(), result.program.module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    found = distill_step(module, teacher, batch, optimizer, "mse")
    a, b = (model_outputs(m, batch).double() for m in (teacher, result.simulated))
    expected = ((a - b).square().flatten(1).mean(1) / a.square().flatten(1).mean(1)).mean()
    # The step runs modules, `model_outputs` convolutions with channels last: sums in another order.
    assert found == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(OptionError, match="loss"):
        distill_step(module, teacher, batch, optimizer, "hinge")
    with torch.no_grad():
        tensor_at(module, "out.bias").fill_(torch.nan)
    with pytest.raises(FailureError, match="is nan; start again with lower learning rates"):
        distill_step(module, teacher, batch, optimizer)


def norm_values(module: GraphModule, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the batch norm of ConcatNet sees, and what it makes of it."""
    recorder = torch.fx.Interpreter(module, garbage_collect_values=False)
    with torch.no_grad():
        recorder.run(images)
    (norm,) = (node for node in module.graph.nodes if "running_mean" in str(node.all_input_nodes[3:4]))
    seen, (made, *_) = recorder.env[norm.args[0]], recorder.env[norm]
    assert isinstance(seen, Tensor)
    return seen, made


def norm_input(module: GraphModule, images: Tensor) -> Tensor:
    return norm_values(module, images)[0]


def test_statistics_are_those_of_the_images() -> None:
    images = MODELS["concat"].inputs(8)[0]
    module = concat().trainable()
    before = model_outputs(concat().simulated, (images,)), model_outputs(concat().program.module, (images,))
    seen = norm_input(module, images).double()
    assert reestimate(module, images, batch=3) == 1
    parts = torch.split(seen, 3)
    mean = torch.stack([len(p) * p.mean(dim=(0, 2, 3)) for p in parts]).sum(dim=0) / 8
    variance = torch.stack([len(p) * p.var(dim=(0, 2, 3)) for p in parts]).sum(dim=0) / 8
    torch.testing.assert_close(tensor_at(module, "norm.running_mean").double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tensor_at(module, "norm.running_var").double(), variance, rtol=1e-5, atol=1e-6)
    # The result and its float model keep theirs.
    assert torch.equal(model_outputs(concat().simulated, (images,)), before[0])
    assert torch.equal(model_outputs(concat().program.module, (images,)), before[1])


def test_statistics_that_follow_a_reference_give_the_norm_its_moments() -> None:
    images = MODELS["concat"].inputs(24)[0]
    result = concat()
    # Weights that changed, as those of few bits do.
    module, reference = result.trainable(), result.program.module
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("weight") and parameter.dim() == 4:
                parameter.mul_(torch.linspace(0.5, 1.2, len(parameter)).reshape(-1, 1, 1, 1))
    wanted = norm_values(reference, images)[1].double()
    before = norm_values(module, images)[1].double()
    assert reestimate(module, images, reference=reference) == 1
    after = norm_values(module, images)[1].double()
    for moment in (torch.mean, torch.std):
        here, there, then = (moment(value, dim=(0, 2, 3)) for value in (after, wanted, before))
        torch.testing.assert_close(here, there, rtol=2e-3, atol=2e-3)
        assert float((then - there).abs().max()) > 0.1
    # The moments of the images alone would be others: the float network keeps what it learned.
    alone = result.trainable()
    assert reestimate(alone, images) == 1
    assert (
        float((norm_values(alone, images)[1].double().mean(dim=(0, 2, 3)) - wanted.mean(dim=(0, 2, 3))).abs().max())
        > 0.1
    )
    with pytest.raises(OptionError, match=r"the reference has no batch norm .*; give the float graph"):
        reestimate(module, images, reference=low_bit().program.module)


def test_a_norm_behind_another_sees_normalized_batches() -> None:
    """Two norms in a row: the statistics of the second are those of the first's batch-normalized output."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Flatten())
    images = torch.randn(16, 3, 4, 4)
    result = fxquant.quantize(net.eval(), images, Budget(average_bits=8), target="reference", effort="fast")
    module = result.trainable()
    assert reestimate(module, images) == 2
    twin = nn.Sequential(
        *(nn.BatchNorm2d(3, momentum=1.0) if isinstance(m, nn.BatchNorm2d) else m for m in list(net)[:4])
    )
    twin.train()(images)
    for name in ("1.running_mean", "1.running_var", "3.running_mean", "3.running_var"):
        torch.testing.assert_close(tensor_at(module, name), twin.state_dict()[name], rtol=0.02, atol=0.02)


def test_without_norms_nothing_is_changed() -> None:
    module = low_bit().trainable()
    known = {name: t.clone() for name, t in module.state_dict().items()}
    assert reestimate(module, IMAGES) == 0
    assert all(torch.equal(t, known[name]) for name, t in module.state_dict().items())


def test_one_value_per_channel_is_refused() -> None:
    root, graph = nn.BatchNorm1d(3), Graph()
    statistics = [graph.get_attr(name) for name in ("weight", "bias", "running_mean", "running_var")]
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.batch_norm.default, (x, *statistics, False, 0.1, 1e-5, False)))
    with pytest.raises(CalibrationError, match=r"batch_norm.*give at least two images"):
        reestimate(GraphModule(root, graph), torch.randn(1, 3))


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = runpy.run_path(str(ROOT / "examples" / "finetune.py"))["finetune"](tmp_path, steps=3, images=64)
    printed = capsys.readouterr().out
    assert "before" in printed
    assert "after" in printed
    assert (tmp_path / "model.onnx").stat().st_size > 1000
    again = fxquant.load(tmp_path / "result")
    assert again.allocation.measured_loss == found.allocation.measured_loss
    assert torch.equal(model_outputs(again.simulated, again.example), model_outputs(found.simulated, again.example))
