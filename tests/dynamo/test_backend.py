"""torch.compile with our backend against `quantize`: the same answers, for one graph or several, and the refusals."""

from __future__ import annotations

import configparser
import copy
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.core.errors import CalibrationError, InfeasibleBudgetError, OptionError
from fxquant.core.host import Reporter
from fxquant.core.run import CalibrationSet, first_tensor
from fxquant.dynamo import backend as compiling
from fxquant.dynamo import compile_graph
from fxquant.result import Result
from tests.models import MODELS, Composed, built
from tests.small import images, small

BUDGET = {"average_bits": 4}
FAST: dict[str, Any] = {"effort": "fast"}
OPTIONS: dict[str, Any] = {"budget": BUDGET, "calibration": images(), **FAST}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    compiling._LOWERED.clear()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, dynamic: bool | None = None, **options: Any) -> Any:
    """Return the model compiled by our backend, eagerly."""
    return torch.compile(model, backend=compile_graph, dynamic=dynamic, options={"inductor": False, **options})


def expected(model: nn.Module, calibration: object = OPTIONS["calibration"]) -> Result:
    budget = fxquant.Budget(average_bits=4)
    return fxquant.quantize(model, calibration, budget, target="fx_int8", effort="fast", progress=False)


@pytest.mark.parametrize(("name", "batch", "dynamic"), [("residual", 4, True), ("attention", 1, None)])
def test_the_answer_is_that_of_quantize(name: str, batch: int, dynamic: bool | None) -> None:
    """Whether sizes are inputs of the graph, or one image is written into its reshapes."""
    model, calibration, x = built(name), [MODELS[name].inputs(12)], MODELS[name].inputs(batch)
    made = compiled(model, dynamic, budget=BUDGET, calibration=calibration, **FAST)(*x)
    assert torch.equal(made, first_tensor(expected(model, calibration).lowered(*x)))
    assert not torch.equal(made, model(*x))
    assert not made.requires_grad


def test_inputs_are_distinguished_by_name_and_all_outputs_come_back(tmp_path: Path) -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            late = self.b(y)
            return self.a(x), late

    torch.manual_seed(1)
    model, x, y = Swapped().eval(), torch.randn(12, 6), 5 * torch.randn(12, 6)
    known = expected(model, [(x, y)])
    wanted = known.lowered(x, y)
    for options in (
        {"budget": fxquant.Budget(average_bits=4), "calibration": [(x, y)], **FAST},
        {"result": known.save(tmp_path)},
    ):
        torch._dynamo.reset()
        made = compiled(model, **options)(x, y)
        assert [torch.equal(one, other) for one, other in zip(made, wanted, strict=True)] == [True, True]


def test_other_batches_recompile_and_do_not_quantize_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def counted(*arguments: Any, **options: Any) -> Result:
        calls.append(options)
        return fxquant.quantize(*arguments, **options)

    monkeypatch.setattr(compiling, "quantize", counted)
    run, lowered = compiled(small(), **OPTIONS), expected(small()).lowered
    for batch in (2, 5, 1, 7):
        assert torch.equal(run(images(batch)), first_tensor(lowered(images(batch))))
    assert len(calls) == 1


def test_other_weights_are_quantized_on_their_own() -> None:
    """In place, and of another model of the same class, for which Dynamo takes the code it has."""
    one, other = small(), small()
    with torch.no_grad():
        other.get_parameter("head.weight").mul_(-2.0)
    wanted = [first_tensor(expected(model).lowered(images(3))) for model in (one, other)]
    for model, answer in zip((one, other), wanted, strict=True):
        assert torch.equal(compiled(model, **OPTIONS)(images(3)), answer)
    run = compiled(one, **OPTIONS)
    with torch.no_grad():
        one.get_parameter("head.weight").copy_(other.get_parameter("head.weight"))
    assert torch.equal(run(images(3)), wanted[1])


class Broken(nn.Module):
    """A model that Dynamo cuts in two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        torch._dynamo.graph_break()
        answer: Tensor = self.head(self.body(x).mean(dim=(2, 3)))
        return answer


def test_each_graph_of_a_broken_model_is_quantized() -> None:
    """The second reads images of the same shape as the model, and is calibrated on what it reads all the same."""
    torch.manual_seed(2)
    model, x = Broken().eval(), images(16)
    run = compiled(model, budget={"average_bits": 8}, calibration=images(), **FAST)
    with pytest.warns(UserWarning, match="behind a graph break is calibrated on the 16 images of its first call"):
        made = run(x)
    real = model(x).detach()
    assert 0 < float((made - real).abs().max()) < 0.05 * float(real.abs().max())
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="called with one image, too few to calibrate with: 1 linear layers run on"):
        compiled(Broken().eval(), **OPTIONS)(images(1))


def test_training_runs_uncompiled_with_its_gradients() -> None:
    model, x, calibration = built("separable").train(), MODELS["separable"].inputs(4), [MODELS["separable"].inputs(12)]
    run = compiled(model, budget=BUDGET, calibration=calibration, **FAST)
    statistics = model.get_buffer("norm.running_mean").clone()
    with pytest.warns(UserWarning, match=r"is not quantized: .*batch_norm.* runs in training mode; call .* in eval"):
        run(*x).sum().backward()
    assert model.get_parameter("head.weight").grad is not None
    assert not torch.equal(statistics, model.get_buffer("norm.running_mean"))
    model.eval()
    assert torch.equal(run(*x), first_tensor(expected(model, calibration).lowered(*x)))


def test_an_input_that_requires_a_gradient_gets_it() -> None:
    x = images(4).requires_grad_()
    with pytest.warns(UserWarning, match="an input requires a gradient"):
        compiled(small(), budget=BUDGET, calibration=images())(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgett": BUDGET}, r"unknown option 'budgett' \(did you mean 'budget'\?\); known: budget, calibration"),
        ({"budget": BUDGET}, "option 'budget' needs calibration images"),
        ({"plan": "plan.json"}, "option 'plan' needs calibration images"),
        ({"calibration": [1]}, "option 'calibration' is not used alone; add 'budget' or 'plan'"),
        ({"calibration": [1], "result": "folder"}, "'calibration' is not used with 'result'"),
        ({"result": "folder", "budget": BUDGET}, "budget and result exclude each other"),
        ({**FAST}, "need a 'budget'"),
        ({"budget": {"bits": 4}, "calibration": images()}, "unknown budget 'bits'"),
        ({"budget": BUDGET, "calibration": torch.zeros(4, 1, 9, 9)}, r"\(1, 9, 9\), the compiled model is called with"),
        ({"budget": {"average_bits": 0.1}, "calibration": images()}, "average_bits"),
    ],
)
def test_options_that_cannot_be_used_reach_the_caller_as_they_are(options: dict[str, Any], message: str) -> None:
    with pytest.raises((OptionError, CalibrationError, InfeasibleBudgetError), match=message):
        compiled(small(), **options)(images(2))


def test_images_of_another_size_are_not_run_on_the_grids_and_shapes_of_the_first() -> None:
    """Dynamo's own graph may hold for any size."""
    run = compiled(small(), True, **OPTIONS)
    run(images(3))
    with pytest.raises(CalibrationError, match=r"shape \(1, 8, 8\), the compiled model is called with .*\(1, 12, 12\)"):
        run(torch.zeros(3, 1, 12, 12))


def test_without_options_linear_layers_are_scaled_dynamically() -> None:
    model, x = small(), images(6)
    with pytest.warns(UserWarning, match="neither a budget nor a plan was given: 1 linear layers run on int8, their"):
        made = compiled(model)(x)
    real = model(x).detach()
    assert 0 < float((made - real).abs().max()) < 0.02 * float(real.abs().max())


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Conv2d(1, 2, 3), {}, "there is no linear layer, and the graph stays in float"),
        (nn.ReLU(), {"budget": BUDGET, "calibration": images()}, "no convolution or linear layer"),
    ],
)
def test_without_what_can_be_quantized_the_graph_stays_in_float(
    model: nn.Module, options: dict[str, Any], message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        made = compiled(model.eval(), **options)(images(2))
    assert torch.equal(made, model(images(2)))


def test_a_batch_that_cannot_be_taken_out_says_so_and_a_dynamic_one_helps() -> None:
    """The batch is multiplied into another size."""

    def answer(m: Any, x: Tensor) -> Tensor:
        return torch.relu(m.head(x.reshape(x.shape[0] * 4, 16))).reshape(x.shape[0], 12)

    model = Composed(answer, head=nn.Linear(16, 3)).eval()
    with pytest.warns(UserWarning, match=r"stays in float: the graph is made for 3 images .* give .* dynamic=True"):
        made = compiled(model, **OPTIONS)(images(3))
    assert torch.equal(made, model(images(3)))
    torch._dynamo.reset()
    made = compiled(model, True, **OPTIONS)(images(3))
    assert torch.equal(made, first_tensor(expected(model).lowered(images(3))))


def test_a_plan_made_elsewhere_is_the_plan_here(tmp_path: Path) -> None:
    model, known = small(), expected(small())
    known.allocation.to_json(tmp_path / "plan.json")
    made = compiled(model, plan=tmp_path / "plan.json", calibration=images())(images(5))
    simulated = first_tensor(known.simulated(images(5)))
    # Its ranges come from all images, those of the result from the part that was not held out.
    torch.testing.assert_close(made, simulated, atol=0.05, rtol=0)
    mixed = fxquant.BitAllocation({**known.allocation.choices, "body": fxquant.Choice(32, 32)})
    torch._dynamo.reset()
    renamed = fxquant.BitAllocation({f"model.{name}": choice for name, choice in mixed.choices.items()})
    made = compiled(model, plan=renamed, calibration=images())(images(5))
    torch.testing.assert_close(made, first_tensor(known.with_plan(mixed).simulated(images(5))), atol=0.05, rtol=0)
    torch._dynamo.reset()
    floats = fxquant.BitAllocation(dict.fromkeys(known.allocation.choices, fxquant.Choice(32, 32)))
    with pytest.raises(OptionError, match="leaves every layer in float"):
        compiled(model, plan=floats, calibration=images())(images(5))


def test_a_saved_result_runs_and_another_models_is_refused(tmp_path: Path) -> None:
    model, known = small(), expected(small())
    made = compiled(model, result=known.save(tmp_path))(images(5))
    assert torch.equal(made, first_tensor(known.lowered(images(5))))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("body.bias").add_(1.0)
    torch._dynamo.reset()
    with pytest.raises(OptionError, match=r"weight 'body.bias' of shape \(6,\): its values differ"):
        compiled(other, result=known)(images(5))


def test_where_inductor_fails_the_graph_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any) -> Tensor:
        raise RuntimeError("no compiler\nanywhere")

    model = small()
    graph = fxquant.capture(model, images()).module
    monkeypatch.setattr(compiling, "compiled", lambda _: failing)
    run = compiling._Inductor(graph, Reporter())
    with pytest.warns(UserWarning, match=r"runs eagerly instead \(no compiler\)"):
        made = run(images(2))
    assert torch.equal(first_tensor(made), model(images(2)))
    run(images(2))
    assert capsys.readouterr().err.splitlines() == ["1 of 1: compile the integer graph with Inductor"]


def test_what_is_done_is_said_unless_told_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    _ = compiled(small(), **OPTIONS)(images(2))
    assert re.search(r"1 of \d: capture the graph\n.*\d of \d: choose a plan\n", capsys.readouterr().err, re.DOTALL)
    compiling._LOWERED.clear()
    torch._dynamo.reset()
    _ = compiled(small(), progress=False, **OPTIONS)(images(2))
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("error:.*runs eagerly instead")
def test_what_the_readme_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "fxquant" not in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(name="fxquant")(compile_graph)
    text = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    (shown,) = (block for block in blocks if "torch.compile" in block)
    known = expected(small())
    monkeypatch.chdir(tmp_path)
    known.save("folder")
    space = {"torch": torch, "model": small(), "calibration": images(), "images": images(3)}
    exec(shown, space)
    assert torch.is_tensor(space["logits"])
    torch.testing.assert_close(space["logits"], first_tensor(known.lowered(images(3))), atol=1e-4, rtol=0)


def test_the_entry_point_is_there() -> None:
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    name, _, place = config["options.entry_points"]["torch_dynamo_backends"].strip().partition(" = ")
    module, _, attribute = place.partition(":")
    assert name == "fxquant"
    assert getattr(importlib.import_module(module), attribute) is compile_graph


@pytest.mark.slow
def test_two_models_of_one_class_have_calibration_sets_of_their_own() -> None:
    answers = []
    for calibration in (CalibrationSet((images(8),)), CalibrationSet((images(8) + 1,))):
        answers.append(compiled(small(), **{**OPTIONS, "calibration": calibration})(images(4)))
        assert torch.equal(answers[-1], first_tensor(expected(small(), calibration).lowered(images(4))))
    assert not torch.equal(*answers)
