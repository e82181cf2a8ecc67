from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.capture import DECOMPOSITIONS, capture, input_names
from fxquant.core.errors import CaptureError
from fxquant.core.ir import sample_elements, sample_shape, show
from fxquant.core.run import first_tensor
from tests.models import MODELS, Composed, ResidualNet, TwoInputNet, built
from tests.programs import captured
from tests.unusual_models import Classifier, ValueDependentNet, VariadicNet

aten = torch.ops.aten


def leaves(value: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_graph_answers_like_the_model_for_any_batch(name: str, count: int) -> None:
    inputs = MODELS[name].inputs(count)
    with torch.no_grad():
        theirs, ours = built(name)(*inputs), captured(name).module(*inputs)
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
    for one, other in zip(leaves(ours), leaves(theirs), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_callers_model_stays_as_it_was() -> None:
    model = ResidualNet().train()
    model.fc.eval()
    inputs = MODELS["residual"].inputs(2)
    model(*inputs).sum().backward()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert grads
    program = capture(model, inputs)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grads[name])
    ours = {p.data_ptr() for p in program.module.parameters()}
    assert not ours & {p.data_ptr() for p in model.parameters()}, "weights of the program are its own"
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(*inputs)
    assert torch.allclose(program.module(*inputs), expected, atol=1e-6)


def test_an_exported_program_is_taken_as_it_is() -> None:
    inputs = MODELS["two_inputs"].inputs(2)
    exported = torch.export.export(built("two_inputs"), inputs)
    assert input_names(exported) == ["image", "mask"]
    program = capture(exported, inputs)
    assert torch.equal(program.module(*inputs)["logits"], built("two_inputs")(*inputs)["logits"])


def test_a_single_image_still_gives_a_dynamic_batch() -> None:
    model = nn.Linear(3, 2)
    program = capture(model, (torch.randn(1, 3),))
    assert program.module(torch.randn(5, 3)).shape == (5, 2)
    fixed = capture(model, (torch.randn(4, 3),), dynamic_batch=False)
    assert show(fixed.module) == show(program.module)


def test_inputs_may_be_parts_of_larger_tensors() -> None:
    step = Composed(lambda net, x, h: net.cell(x, h), cell=nn.GRUCell(6, 5)).eval()
    x, states = torch.randn(4, 6), torch.randn(4, 10)
    program = capture(step, (x, states[:, 5:]))
    torch.testing.assert_close(program.module(x[:3], states[:3, :5]), step(x[:3], states[:3, :5]))


@pytest.mark.parametrize("others", [0, 1, 2])
def test_any_number_of_inputs(others: int) -> None:
    model = VariadicNet()
    inputs = tuple(torch.randn(2, 3) for _ in range(1 + others))
    program = capture(model, inputs)
    more = tuple(torch.randn(5, 3) for _ in inputs)
    assert torch.allclose(program.module(*more), model(*more), atol=1e-6)


class Named(nn.Module):
    def forward(self, image: Tensor, mask: Tensor, *, scale: float = 1.0) -> Tensor:
        return image * mask * scale


class Optional(nn.Module):
    def forward(self, x: Tensor | None = None) -> Tensor:
        assert x is not None
        return x


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Named(), ["image", "mask"]),
        (Optional(), ["x"]),
        (nn.Sequential(nn.ReLU()), ["input"]),
        (VariadicNet(), ["first"]),
        (TwoInputNet(), ["image", "mask"]),
    ],
)
def test_names_of_inputs(model: nn.Module, names: list[str]) -> None:
    assert input_names(model) == names


@pytest.mark.parametrize(
    ("wrong", "found"), [("net.pt", "a str"), ({"w": torch.zeros(1)}, "a dict"), (None, "a NoneType")]
)
def test_names_of_what_is_no_model(wrong: Any, found: str) -> None:
    with pytest.raises(CaptureError, match=f"model is {found}; give a torch.nn.Module"):
        input_names(wrong)


def test_control_flow_on_values_names_the_users_line() -> None:
    with pytest.raises(CaptureError, match=r"does not export to a graph at .*models\.py:\d+.*torch\.where") as caught:
        capture(ValueDependentNet(), (torch.randn(2, 3),))
    place = re.search(r"unusual_models\.py:(\d+)", str(caught.value))
    assert place is not None
    lines = (Path(__file__).parents[1] / "unusual_models.py").read_text().splitlines()
    assert lines[int(place.group(1)) - 1].strip() == "if x.sum() > 0:"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.randn(2, 4, 8, 8),), r"does not run on inputs of shape \[\(2, 4, 8, 8\)\].*check the shape and type"),
        ((torch.zeros(2, 3, 8, 8, dtype=torch.int64),), "does not run on inputs"),
        ((), r"does not run on inputs of shape \[\]"),
        ((torch.randn(2, 3, 8, 8), torch.randn(2)), "does not run on inputs"),
    ],
)
def test_inputs_the_model_cannot_take(inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(ResidualNet(), inputs)


def test_statistics_that_are_nan_and_masks_that_are_infinite() -> None:
    norm = nn.BatchNorm1d(3)
    assert norm.running_var is not None
    norm.running_var[1] = float("nan")
    with pytest.raises(CaptureError, match="buffer 'running_var' holds 1 NaN"):
        capture(norm, (torch.randn(2, 3),))

    masked = Composed(lambda m, x: torch.softmax(x + m.mask, dim=1))
    masked.register_buffer("mask", torch.tensor([0.0, float("-inf"), 0.0]))
    assert bool(torch.isfinite(capture(masked, (torch.randn(2, 3),)).module(torch.randn(2, 3))).all())


@pytest.mark.parametrize("model", [torch.relu, "resnet18", None])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(CaptureError, match=r"give a torch\.nn\.Module or an ExportedProgram"):
        capture(model, (torch.randn(2, 3),))


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("derived", model.weight * 2)
    with pytest.raises(CaptureError, match="cannot be copied"):
        capture(model, (torch.randn(2, 2),))


def test_attention_is_taken_apart() -> None:
    text = show(captured("attention").module)
    assert "scaled_dot_product" not in text
    assert text.count("matmul.default(") == 2
    assert text.count("softmax.int(") == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.randn(5, 6)},
        {"attn_mask": torch.ones(5, 6, dtype=torch.bool).tril(1)},
        {"enable_gqa": True},
    ],
)
def test_decomposed_attention_is_attention(options: dict[str, Any]) -> None:
    groups = 2 if "enable_gqa" in options else 4
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, groups, 6, 8), torch.randn(2, groups, 6, 8)
    ours = DECOMPOSITIONS[aten.scaled_dot_product_attention.default](query, key, value, **options)
    theirs = F.scaled_dot_product_attention(query, key, value, **options)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_batch_norm_runs_on_its_statistics() -> None:
    assert show(captured("shared").module).count("_native_batch_norm_legit_no_training.default(") == 2
    assert "dropout" not in show(captured("separable").module)


def test_height_and_width_are_free_when_asked_for() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    program = capture(model.eval(), (torch.randn(2, 3, 16, 16),), dynamic_image=True)
    for count, height, width in ((1, 16, 16), (3, 9, 40)):
        x = torch.randn(count, 3, height, width)
        assert torch.allclose(program.module(x), model(x), atol=1e-5)
    sizes = next(node for node in program.module.graph.nodes if node.op == "placeholder").meta["val"].shape
    assert [isinstance(size, int) for size in sizes] == [False, True, False, False]
    # Costs are those of one image of the size it was captured with.
    convolution = next(node for node in program.module.graph.nodes if node.target is aten.conv2d.default)
    assert sample_shape(convolution) == (1, 4, 7, 7)
    assert sample_elements(convolution)[0] == 4 * 7 * 7


@pytest.mark.parametrize(
    ("model", "shape", "said"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)), (2, 3, 8, 8), "images of 8x8 only"),
        (nn.Linear(3, 2), (2, 3), "needs an input"),
    ],
)
def test_a_model_of_one_image_size_is_refused(model: nn.Module, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(CaptureError, match=said):
        capture(model, (torch.randn(shape),), dynamic_image=True)


def test_a_batch_counted_by_len_stays_free() -> None:
    """Plain tracing turns `len(x)` into a number."""
    x, token = torch.randn(5, 3), nn.Parameter(torch.ones(1, 3))
    model = Composed(lambda m, x: torch.cat([m.token.expand(len(x), -1), x], dim=1), token=token)
    torch.testing.assert_close(capture(model, (x[:2],)).module(x), model(x))


def test_a_model_for_one_number_of_images_is_refused_with_what_to_write() -> None:
    model = Composed(lambda m, x: x + m.each, each=nn.Parameter(torch.ones(2, 3)))
    with pytest.raises(CaptureError, match=r"takes 2 images at a time and no other number.*x.shape\[0\] or -1"):
        capture(model, (torch.randn(2, 3),))
    assert capture(model, (torch.randn(2, 3),), dynamic_batch=False).module is not None


def wrapped(answer: Callable[[Tensor], object]) -> nn.Module:
    """Return a model whose answer no graph can return, on one batch size only unless the bytecode is read."""
    return Composed(lambda m, x: answer(m.head(x.reshape(len(x), 12))), head=nn.Linear(12, 2))


def test_a_dataclass_becomes_a_dictionary_with_the_logits_first() -> None:
    model, x = Classifier().eval(), torch.randn(3, 3, 5, 5)
    program = capture(model, (x[:2],))
    ours, theirs = program.module(x), model(x)
    assert list(ours) == ["logits", "features", "loss"]
    assert ours["loss"] is None
    assert torch.allclose(first_tensor(ours), theirs.logits, atol=1e-6)
    assert not model._forward_hooks


def test_a_free_batch_and_a_dictionary() -> None:
    program = capture(wrapped(lambda y: {"features": y * 2, "logits": y}), (torch.randn(2, 3, 4),))
    assert list(program.module(torch.randn(5, 3, 4))) == ["logits", "features"]


def test_an_output_that_no_graph_can_return() -> None:
    with pytest.raises(CaptureError, match=r"^the model returns a SimpleNamespace, whose tensors"):
        capture(wrapped(lambda y: SimpleNamespace(logits=y)), (torch.randn(2, 3, 4),))
