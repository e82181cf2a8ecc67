from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fxquant
from fxquant import Budget, Choice, Result, Settings
from fxquant.core.errors import CalibrationError, FileFormatError, InfeasibleBudgetError, OptionError
from fxquant.core.facts import EFFORTS, BitAllocation, ChannelScales, EffortName, options_of
from fxquant.core.ir import FLOAT, Sites
from fxquant.core.run import model_outputs
from fxquant.dynamo import CompileOptions
from fxquant.passes.sensitivity import ESTIMATORS
from tests.models import MODELS, built
from tests.scoring import plain_net
from tests.small_runs import BUDGET, IMAGES, quantize, quantized, same


def test_the_public_names() -> None:
    assert fxquant.__all__ == sorted(set(fxquant.__all__))
    assert len(fxquant.__all__) <= 24
    assert all(getattr(fxquant, name, None) is not None for name in fxquant.__all__)


def test_what_people_change_often_is_named_and_the_rest_is_in_options() -> None:
    named = inspect.signature(fxquant.quantize).parameters.keys()
    assert len(named) <= 14
    assert named - options_of(Settings).keys() == {"model", "calibration", "budget", "workdir", "progress", "options"}
    base = Settings(bits=(8,), seed=3)
    for options in (base, {"bits": (8,), "seed": 3}):
        settings = fxquant.quantize(plain_net(), IMAGES, None, bits=(4,), effort="fast", options=options).program[
            Settings
        ]
        assert (settings.bits, settings.seed, settings.estimators) == ((4,), 3, ("fisher_out",))


def test_importing_it_imports_no_runtime() -> None:
    heavy = ("onnx", "onnxruntime", "onnxscript", "sklearn", "jinja2", "matplotlib", "PIL")
    code = f"import sys, fxquant; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_same_seed_gives_the_same_answer() -> None:
    assert same(quantized(), quantize())


def test_another_seed_holds_out_other_images() -> None:
    one, other = quantized().held_out, quantize(seed=1, effort="fast").held_out
    assert one is not None
    assert other is not None
    assert len(one) == len(other) == 6
    assert not torch.equal(one.inputs[0], other.inputs[0])


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_is_untouched(training: bool) -> None:
    model = built("residual").train(training)
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    result = fxquant.quantize(model, MODELS["residual"].inputs(8), BUDGET, target="reference", effort="fast")
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    reference = built("residual")(*MODELS["residual"].inputs(4))
    torch.testing.assert_close(model_outputs(result.program.module, MODELS["residual"].inputs(4)), reference.detach())


def test_the_model_is_captured_in_eval_whatever_its_flag() -> None:
    assert same(quantized(effort="fast"), quantize(effort="fast", model=plain_net().train()))


def test_an_exported_program_gives_the_same_plan_and_stays_as_it_was(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(plain_net(), (IMAGES[:2],), dynamic_shapes=({0: batch},))
    graph, example = str(exported.graph), exported.example_inputs
    result = quantize(model=exported)
    assert result.allocation.choices == quantized().allocation.choices
    result.save(tmp_path)
    assert str(exported.graph) == graph
    assert exported.example_inputs is example


LABELS = torch.arange(24) % 4
CALIBRATIONS: dict[str, object] = {
    "batches": [IMAGES[:10], IMAGES[10:]],
    "loader": DataLoader(TensorDataset(IMAGES, LABELS), batch_size=7),
    "tuples": [(IMAGES[:10], LABELS[:10]), (IMAGES[10:], LABELS[10:])],
    "dicts": [{"x": IMAGES[:10], "label": LABELS[:10]}, {"x": IMAGES[10:]}],
    "array": IMAGES.numpy(),
    "arrays": [IMAGES[:10].numpy(), IMAGES[10:].numpy()],
    "generator": (IMAGES[k : k + 5] for k in range(0, 24, 5)),
}


@pytest.mark.parametrize("kind", list(CALIBRATIONS))
def test_every_kind_of_calibration_data(kind: str) -> None:
    assert same(quantized(effort="fast"), quantize(effort="fast", calibration=CALIBRATIONS[kind]))


def test_labels_for_cross_entropy() -> None:
    result = quantize(calibration=[(IMAGES, LABELS)], loss="ce", effort="fast")
    assert result.sensitivity.unit == "cross-entropy nats"
    with pytest.raises(CalibrationError, match="needs labels"):
        quantize(loss="ce", effort="fast")


def test_the_stages_give_the_plan_of_the_one_call() -> None:
    known = quantized().held_out
    assert known is not None
    kept = {tuple(image.flatten().tolist()) for image in known.inputs[0]}
    scoring = torch.stack([image for image in IMAGES if tuple(image.flatten().tolist()) not in kept])
    program = fxquant.capture(plain_net(), IMAGES)
    program = fxquant.prepare(program, Settings(target="reference"))
    program = fxquant.calibrate(program, scoring, progress=False)
    program = fxquant.measure_sensitivity(program, scoring, progress=False)
    program = fxquant.allocate(program, BUDGET, scoring, held_out=known, progress=False)
    simulated = fxquant.convert(program)
    staged, at_once = Result(program, known), quantized(rounding="nearest")
    assert same(at_once, staged)
    assert torch.equal(simulated.module(IMAGES), at_once.simulated(IMAGES))


def test_own_data_through_the_prepared_graph() -> None:
    program = fxquant.prepare(fxquant.capture(plain_net(), IMAGES), Settings(target="reference", bits=(8,)))
    with pytest.raises(CalibrationError):
        fxquant.calibrate(program)
    with torch.no_grad():
        program.module(IMAGES)
    own = fxquant.calibrate(program)
    # Without images weights are rounded to nearest, and channels are as they were.
    settings = Settings(target="reference", bits=(8,), scoring_rounding="nearest")
    fed = fxquant.calibrate(fxquant.prepare(fxquant.capture(plain_net(), IMAGES), settings), IMAGES)
    plan = fxquant.BitAllocation({site.name: Choice(8, 8) for site in own[Sites].sites})
    with torch.no_grad():
        answers = [fxquant.convert(each, plan).module(IMAGES) for each in (own, fed)]
        wanted = plain_net()(IMAGES)
    errors = [float((answer - wanted).square().mean() / wanted.square().mean()) for answer in answers]
    assert max(errors) < 1e-3
    assert ChannelScales in fed
    assert ChannelScales not in own


def test_a_plan_edited_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    quantized().allocation.to_json(path)
    text = path.read_text()
    label = quantized().allocation.choices["conv1"].label
    path.write_text(text.replace(f'"conv1": "{label}"', '"conv1": "W2cA8"'))
    done = fxquant.convert(quantized().program, path)
    weight = done.module.get_submodule("quantize_conv1_weight")(done.module.get_parameter("conv1.weight"))
    assert max(len(channel.unique()) for channel in weight) <= 4
    path.write_text(text.replace(f'"conv1": "{label}"', '"conv1": "W1A8"'))
    with pytest.raises(FileFormatError):
        fxquant.convert(quantized().program, path)
    path.write_text(text.replace('"conv1"', '"conv9"'))
    with pytest.raises(OptionError, match="conv1"):
        fxquant.convert(quantized().program, path)


@pytest.mark.parametrize("effort", sorted(EFFORTS))
def test_effort(effort: EffortName) -> None:
    estimators = list(EFFORTS[effort].estimators)
    result = quantized(effort=effort)
    assert list(result.finalists)[: len(estimators)] == estimators
    assert result.sensitivity.estimator == estimators[0]
    assert not any(name in result.finalists for name in set(ESTIMATORS) - set(estimators))


def test_around_the_widest_integers_only_what_can_be_scored_there() -> None:
    result = quantize(context="widest")
    assert "gram" in result.finalists
    assert not any(name in result.finalists for name, each in ESTIMATORS.items() if each.float_only)
    assert quantize(context="widest", effort="fast").allocation.estimator.startswith(("diagonal", "uniform"))
    with pytest.raises(OptionError, match="'fit' is defined around the float network only"):
        quantize(context="widest", estimators=("fit",))


def test_effort_limits_the_images() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield IMAGES

    result = quantize(calibration=endless(), effort="fast")
    assert result.held_out is not None
    assert len(result.held_out) == 24


@pytest.mark.parametrize(
    "budget",
    [
        Budget(average_bits=3),
        Budget(size_mb=0.001),
        Budget(size_ratio=0.45),
        Budget(bops=400_000),
        Budget(bops_ratio=0.03),
        Budget(average_bits=5, bops_ratio=0.03, size_ratio=0.5),
        Budget(latency_ms=1e4),
        Budget(latency_ratio=1e4, average_bits=4),
    ],
    ids=str,
)
def test_every_kind_of_budget(budget: Budget) -> None:
    plan = fxquant.resolve(quantized(), budget, progress=False).allocation
    assert plan.limits == budget.limits
    assert all(plan.used[name] <= limit * (1 + 1e-9) for name, limit in budget.limits.items())
    compared = plan.measured_loss if plan.compared_loss is None else plan.compared_loss
    assert compared == pytest.approx(min(plan.finalists.values()), rel=1e-4)


@pytest.mark.parametrize("budget", [{"average_bits": 4.5}, "average_bits=4.5", ["average_bits=4.5"]])
def test_a_budget_is_taken_in_every_form_at_every_door(budget: Any) -> None:
    result, program = quantize(budget=budget, effort="fast"), quantized().program
    assert result.allocation.limits == BUDGET.limits
    assert fxquant.resolve(quantized(), budget, progress=False).allocation.limits == BUDGET.limits
    (plan,) = fxquant.pareto(quantized(), [budget])
    assert plan.limits == BUDGET.limits == fxquant.allocate(program, budget, progress=False)[BitAllocation].limits
    assert CompileOptions.of({"budget": budget, "calibration": IMAGES}).budget == BUDGET
    with pytest.raises(OptionError, match=r"budget 4\.5 is not"):
        quantize(budget=4.5)


def test_a_budget_out_of_reach() -> None:
    for budget in (Budget(average_bits=0.5), Budget(average_bits=8, size_ratio=0.01)):
        with pytest.raises(InfeasibleBudgetError, match="reachable"):
            quantize(budget=budget, effort="fast")
    with pytest.raises(InfeasibleBudgetError, match="latency_ms=1e-09"):
        fxquant.resolve(quantized(), Budget(latency_ms=1e-9))


def test_options_that_make_no_sense() -> None:
    for change, message in (
        ({"target": "onnxrt"}, "unknown target 'onnxrt'; known: reference, simulation, onnxruntime"),
        ({"solver": "iqq"}, "iqp"),
        ({"estimators": ("grm",)}, "gram"),
        ({"effort": "max"}, "unknown effort"),
        ({"pins": {"conv1": "8 bits"}}, "write W4A8"),
        ({"pins": {"stem": "W8A8"}}, "matches no site"),
        ({"bits": (9,)}, "out of range"),
        ({"observer": "mxe"}, "mse"),
        ({"loss": "l2"}, "unknown loss|kl"),
    ):
        with pytest.raises(OptionError, match=message):
            quantize(effort=change.pop("effort", "fast"), **change)
    with pytest.raises(CalibrationError, match="one image; give at least two"):
        quantize(calibration=IMAGES[:1])


def test_pins_ends_and_float_sites() -> None:
    result = quantize(
        pins={"conv2": "W4A8", "conv3": "float"},
        pin_ends=True,
        bits=(2, 4, 8, 32),
        effort="fast",
        budget=Budget(average_bits=7.9),
    )
    choices = result.allocation.choices
    assert choices == {"conv1": Choice(8, 8), "conv2": Choice(4, 8), "fc": Choice(8, 8)}
    assert "kept in float as asked" in result.program[Sites].refusals.values()


def test_forbidden_precisions_are_not_chosen() -> None:
    budget, bits = Budget(average_bits=4), (2, 4, 8, 32)
    result = quantize(
        forbid={"conv[23]": "W2A8", "fc": [Choice(2, 8), "W4A8"], "conv1": ("W2A8", "W4A8", "W8A8")},
        keep_float=("conv3",),
        bits=bits,
        effort="fast",
        budget=Budget(average_bits=6),
    )
    assert result.allocation.choices.keys() == {"conv2", "fc"}, "only float is left for conv1"
    assert Choice(2, 8) not in result.allocation.choices.values()
    assert result.allocation.choices["fc"].weight_bits > 4
    # A plan that keeps a forbidden site in float is simulated all the same.
    assert result.with_plan(BitAllocation({"conv2": FLOAT, "fc": Choice(8, 8)})).simulated is not None
    with pytest.raises(InfeasibleBudgetError, match="reachable: 4 to"):
        quantize(forbid={"*": "W2A8"}, bits=(2, 4), effort="fast", budget=Budget(average_bits=3.9))
    with pytest.raises(OptionError, match="without a precision"):
        quantize(forbid={"fc": "W4A8"}, pins={"fc": "W4A8"}, budget=budget)


def test_sites_that_read_one_value_are_scored_where_one_may_not_be_wide() -> None:
    result = quantize(
        bits=(4, 8), activation_bits=(4, 8), forbid={"conv2": ["W8A8"]}, budget=Budget(average_bits=6), effort="fast"
    )
    assert result.allocation.choices["conv2"] != Choice(8, 8)


def test_activation_bits_are_searched_too() -> None:
    result = quantize(bits=(4, 8), activation_bits=(4, 8), budget=Budget(bops_ratio=0.03), effort="fast")
    choices = result.allocation.choices
    assert {c.activation_bits for c in choices.values()} <= {4, 8}
    assert choices["conv2"].activation_bits == choices["conv3"].activation_bits


def test_scores_first_and_a_budget_later() -> None:
    assert same(quantized(), fxquant.resolve(quantize(budget=None), BUDGET))


def test_pareto_is_resolve_for_each_budget() -> None:
    budgets = [Budget(average_bits=bits) for bits in (3, 8, 5)]
    plans = fxquant.pareto(quantized(), budgets)
    assert [plan.limits["average_bits"] for plan in plans] == [3, 8, 5]
    assert [plan.choices for plan in plans] == [fxquant.resolve(quantized(), b).allocation.choices for b in budgets]
    assert plans[1].measured_loss is not None
    assert plans[0].measured_loss is not None
    assert plans[1].measured_loss <= plans[0].measured_loss
