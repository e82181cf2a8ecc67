"""Losses compare floating-point values image by image, whatever a model returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant import flow
from fxquant.core.errors import CaptureError
from fxquant.core.facts import Settings
from fxquant.core.ir import Program
from fxquant.core.run import CalibrationSet, answer_graph, answer_parts, find_answers, first_tensor, model_outputs
from fxquant.flow import answer_note, loss_in_use

Head = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """A convolution and two classifiers; `head` makes the answer of its values (images, 6, 4, 4)."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.one, self.other = nn.Linear(6, 5), nn.Linear(6, 5)
        self.head = head

    def forward(self, x: Tensor) -> Any:
        return self.head(self, torch.relu(self.stem(x)))


def net(head: Head) -> Net:
    torch.manual_seed(0)
    return Net(head).eval()


IMAGES = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def captured(model: nn.Module, dynamic_image: bool = False) -> Program:
    return fxquant.capture(model, IMAGES, dynamic_image)


def pooled(y: Tensor) -> Tensor:
    return y.mean((2, 3))


def tokens(n: Net, y: Tensor) -> Tensor:
    scores: Tensor = n.one(y.flatten(2).transpose(1, 2))
    return scores


def scaled(n: Net, y: Tensor) -> Tensor:
    return F.interpolate(y, scale_factor=2.0, mode="bilinear") * n.one.weight.mean()


# What a model returns -> what of it is compared, images along axis 0.
LAYOUTS: dict[str, tuple[Head, Head]] = {
    "plain": (lambda n, y: n.one(pooled(y)), lambda n, y: n.one(pooled(y))),
    "time first": (lambda n, y: tokens(n, y).transpose(0, 1).log_softmax(2), tokens),
    "time last, images in the middle": (lambda n, y: tokens(n, y).permute(1, 0, 2), tokens),
    "layers stacked": (
        lambda n, y: torch.stack([n.one(pooled(y)), n.other(pooled(y))]),
        lambda n, y: torch.stack([n.one(pooled(y)), n.other(pooled(y))], 1),
    ),
    "as many layers as images traced": (
        lambda _, y: torch.stack([pooled(y)] * 2),
        lambda _, y: pooled(y)[:, None].repeat(1, 2, 1),
    ),
    "images last": (lambda _, y: y.permute(2, 3, 1, 0), lambda _, y: y.permute(0, 2, 3, 1)),
    "rows of images": (lambda n, y: tokens(n, y).flatten(0, 1), lambda n, y: tokens(n, y).transpose(1, 2)),
    "rows, then a layer": (
        lambda n, y: n.one(y.permute(0, 2, 3, 1).reshape(-1, 6)),
        lambda n, y: tokens(n, y).transpose(1, 2),
    ),
    "rows of time steps": (
        lambda n, y: tokens(n, y).transpose(0, 1).reshape(-1, 5),
        lambda n, y: tokens(n, y).transpose(1, 2),
    ),
    "batches joined": (
        lambda n, y: torch.cat([n.one(pooled(y)), n.other(pooled(y))]),
        lambda n, y: torch.stack([n.one(pooled(y)), n.other(pooled(y))], 2),
    ),
}
# Answers of numbers that losses cannot compare -> the values in front of them.
DISCRETE: dict[str, tuple[Head, Head]] = {
    "class of each pixel": (lambda n, y: scaled(n, y).argmax(1), scaled),
    "class along the other axis": (lambda n, y: scaled(n, y).argmax(1).permute(1, 2, 0), scaled),
    "index of max": (lambda n, y: n.one(pooled(y)).max(1)[1], lambda n, y: n.one(pooled(y))),
    "index of topk": (lambda n, y: n.one(pooled(y)).topk(2)[1], lambda n, y: n.one(pooled(y))),
    "bytes": (
        lambda n, y: (scaled(n, y).sigmoid() * 255).round().clamp(0, 255).to(torch.uint8),
        lambda n, y: scaled(n, y).sigmoid() * 255,
    ),
    "mask": (lambda n, y: scaled(n, y) > 0.5, scaled),
    "mask of floats": (lambda n, y: (scaled(n, y) > 0.5).float(), scaled),
    "one-hot": (lambda n, y: F.one_hot(scaled(n, y).argmax(1), 6).float(), scaled),
    "rounded": (lambda n, y: (scaled(n, y) * 8).round() / 8, lambda n, y: scaled(n, y) * 8),
    "numbers of numbers": (lambda n, y: [scaled(n, y).argmax(1) + 1], scaled),
    "first floats": (
        lambda n, y: (lambda scores: (scores.argmax(1), scores.softmax(1)))(scaled(n, y)),
        scaled,
    ),
    "dictionary": (
        lambda _, y: (lambda scores: {"labels": scores.argmax(1), "scores": scores})(pooled(y)),
        lambda _, y: pooled(y),
    ),
    "mean over all images": (lambda n, y: scaled(n, y).mean(), scaled),
}


@pytest.mark.parametrize("name", [*LAYOUTS, *DISCRETE])
def test_what_is_compared_are_floats_of_each_image(name: str) -> None:
    returned, compared = (LAYOUTS | DISCRETE)[name]
    program = captured(net(returned))
    with torch.no_grad():
        expected = net(compared)(IMAGES)
    answer = model_outputs(program.module, (IMAGES,), 3)
    assert answer.shape == expected.shape
    if name != "mean over all images":
        assert torch.allclose(answer, expected, atol=1e-5)


def test_the_model_s_own_answer_needs_no_other_graph() -> None:
    module = captured(net(LAYOUTS["plain"][0])).module
    assert answer_graph(module) is module


@pytest.mark.parametrize("name", DISCRETE)
def test_what_is_compared_instead_is_said(name: str) -> None:
    (note,) = answer_note(captured(net(DISCRETE[name][0])))
    assert ("output 1" if name in ("first floats", "dictionary") else "last floats in front") in note


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout_needs_no_words(name: str) -> None:
    assert answer_note(captured(net(LAYOUTS[name][0]))) == ()


def test_all_outputs_are_compared_in_one_row_of_values() -> None:
    program = captured(net(lambda n, y: (n.one(pooled(y)).argmax(1), tokens(n, y).transpose(0, 1), n.other(pooled(y)))))
    shapes = [tuple(each.shape) for each in answer_parts(program.module)(IMAGES)]
    assert shapes == [(7, 16, 5), (7, 5), (7, 5)]
    expected = torch.cat([each.flatten(1) for each in answer_parts(program.module)(IMAGES)], 1)
    torch.testing.assert_close(model_outputs(program.module, (IMAGES,)), expected, rtol=1e-5, atol=1e-5)
    assert [answer.node.name for answer in find_answers(program.module.graph)] == ["transpose_1", "linear_2", "linear"]


def test_free_sizes_are_no_number_of_images() -> None:
    program = captured(net(lambda _, y: y.permute(2, 3, 0, 1)), dynamic_image=True)
    wide = torch.randn(3, 3, 12, 20)
    assert model_outputs(program.module, (wide,)).shape == (3, 6, 10, 6)


def test_arguments_are_given_as_to_the_model() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net(lambda _, y: y)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            return {"classes": (self.inner(left) + self.inner(right)).argmax(1)}

    program = fxquant.capture(Two(), [(IMAGES, IMAGES)])
    found = first_tensor(answer_graph(program.module)(IMAGES, IMAGES))
    assert found.argmax(1).equal(program.module(IMAGES, IMAGES)["classes"])


@pytest.mark.parametrize(
    ("name", "loss"), [("plain", "kl"), ("rows of images", "kl"), ("time first", "kl"), ("layers stacked", "mse")]
)
def test_the_loss_fits_one_row(name: str, loss: str) -> None:
    program = flow.find_sites(captured(net(LAYOUTS[name][0])), Settings())
    assert loss_in_use(program, CalibrationSet((IMAGES,))).name == loss


def test_an_answer_without_floats_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"returns int64 and no floating-point value .* return class scores"):
        flow.prepare(captured(net(lambda _, y: torch.zeros(y.shape[0], 3, dtype=torch.long))), Settings())


WALKED = ("time first", "rows of images", "batches joined", "class of each pixel", "bytes", "first floats")


@pytest.mark.parametrize("name", WALKED)
def test_every_layout_is_scored_and_measured(name: str) -> None:
    model = net((LAYOUTS | DISCRETE)[name][0])
    options = {"estimators": ["fisher", "diagonal"], "solver": "greedy", "rounds": 0}
    result = fxquant.quantize(model, IMAGES.repeat(2, 1, 1, 1), {"average_bits": 5}, options=options, effort="fast")
    loss = result.allocation.measured_loss
    assert loss is not None
    assert 0 <= loss < 0.1
    assert result.simulated(IMAGES) is not None


def tags_and_layer(n: Net, y: Tensor) -> Any:
    tags = y.sigmoid()
    return tags.flatten(2), n.one(tags.flatten(2).transpose(1, 2))


def joined_and_layer(n: Net, y: Tensor) -> Any:
    joined = torch.cat([n.one(y.flatten(2).transpose(1, 2)).sigmoid(), y.flatten(2).transpose(1, 2)], -1)
    turned = joined.transpose(1, 2)
    return turned, n.other(turned[:, 3:9].transpose(1, 2))


@pytest.mark.parametrize("head", [tags_and_layer, joined_and_layer])
def test_the_same_is_compared_behind_quantizers(head: Head) -> None:
    model = net(head)
    result = fxquant.quantize(model, IMAGES, None, bits=(8,), effort="fast", target="fx_int8", progress=False)
    graphs = (result.program.module, result.simulated_program.module)
    sigmoids = [node for node in graphs[1].graph.nodes if node.target is torch.ops.aten.sigmoid.default]
    assert any(user.op == "call_module" for node in sigmoids for user in node.users)
    plain, simulated = (answer_parts(graph)(IMAGES) for graph in graphs)
    assert len(plain) == (2 if head is tags_and_layer else 3)
    for one, other in zip(plain, simulated, strict=True):
        # Probabilities would be 0.5 where scores are 0, and parts in another order further apart still.
        assert (one - other).abs().max() < 0.1
    with torch.no_grad():
        y = torch.relu(model.stem(IMAGES)).flatten(2)
        torch.testing.assert_close(plain[0], y if head is tags_and_layer else model.one(y.transpose(1, 2)))
