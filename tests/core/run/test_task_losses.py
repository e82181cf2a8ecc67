"""The loss of a whole model: which one fits, and functions that are given."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import fxquant
from fxquant.core.errors import CalibrationError, OptionError
from fxquant.core.run import (
    LOSSES,
    CalibrationSet,
    Loss,
    answer_loss,
    first_output,
    judging_images,
    loss_of,
    model_outputs,
)
from fxquant.passes import Canonicalize
from fxquant.passes.sensitivity import ESTIMATORS
from tests.scoring import inputs, scorer, simulated

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SCORED = CalibrationSet(inputs("plain", 6))
WORDS = torch.randint(0, 9, (8, 5), generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """A convolution to six channels and a linear layer; `head` makes the answer."""

    def __init__(self, head: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.one, self.box = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 5), nn.Linear(6, 4)
        self.head = head

    def forward(self, x: Tensor) -> Any:
        return self.head(self, torch.relu(self.stem(x)))


class Words(nn.Module):
    """Scores of the next of nine words, or of three tags, at each position."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, out)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.relu(self.mix(self.table(x))))
        return scores


def net(head: Callable[[Net, Tensor], Any]) -> Net:
    torch.manual_seed(0)
    return Net(head).eval()


def rows(y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2)


def pooled(y: Tensor) -> Tensor:
    return y.mean((2, 3))


# The answer -> the losses of its outputs, in order.
DEFAULTS: dict[str, tuple[Callable[[Net, Tensor], Any], str]] = {
    "classes": (lambda n, y: n.one(pooled(y)), "kl"),
    "probabilities": (lambda n, y: n.one(pooled(y)).softmax(1), "kl"),
    "one number": (lambda _, y: pooled(y)[:, :1], "mse"),
    "independent classes": (lambda n, y: n.one(pooled(y)).sigmoid(), "bce"),
    "class of each pixel": (lambda _, y: F.interpolate(F.max_pool2d(y, 2), scale_factor=2.0), "kl"),
    "an image": (lambda _, y: y[:, :3], "mse"),
    "a larger image": (lambda _, y: F.pixel_shuffle(y[:, :4], 2), "mse"),
    "a feature map": (lambda _, y: F.avg_pool2d(y, 2), "mse"),
    "time, classes last": (lambda n, y: n.one(rows(y)).log_softmax(-1), "kl"),
    "anchors beside boxes": (lambda n, y: {"cls": n.one(rows(y)), "box": n.box(rows(y))}, "kl+mse"),
    "boxes first": (lambda n, y: (n.box(rows(y)), n.one(rows(y)).sigmoid()), "mse+bce"),
    "levels of heads": (lambda _, y: [y, F.avg_pool2d(y, 2)], "kl+mse"),
    "logits and features": (lambda n, y: {"features": y, "logits": n.one(pooled(y))}, "kl"),
    "labels too": (lambda n, y: (lambda s: (s, s.argmax(1)))(n.one(pooled(y))), "kl"),
}


# Answers behind something else than the softmax or sigmoid itself -> their losses.
MOVED: dict[str, tuple[Callable[[Net, Tensor], Any], str]] = {
    "one tag": (lambda n, y: n.one(pooled(y))[:, :1].sigmoid().squeeze(1), "bce"),
    "tags in another shape": (lambda _, y: y.sigmoid().reshape(y.shape[0], 3, -1), "bce"),
    "tags of each pixel, last": (lambda _, y: y.sigmoid().permute(0, 2, 3, 1), "bce"),
    "some tags": (lambda _, y: F.avg_pool2d(y, 2).sigmoid()[:, 1:4], "bce"),
    "tags in halves": (lambda n, y: n.one(rows(y)).sigmoid().chunk(2, 1)[1], "bce"),
    "tags kept off 0 and 1": (lambda n, y: n.one(pooled(y)).sigmoid().clamp(1e-4, 1 - 1e-4), "bce"),
    "tags in double": (lambda n, y: n.one(pooled(y)).sigmoid().double(), "bce"),
    "logarithms of tags": (lambda n, y: F.logsigmoid(n.one(pooled(y))).unsqueeze(1), "bce"),
    "tags, time first": (lambda n, y: n.one(rows(y)).sigmoid().transpose(0, 1), "bce"),
    "larger tags": (lambda _, y: F.interpolate(F.avg_pool2d(y, 2).sigmoid(), scale_factor=2.0)[..., 1:], "bce"),
    "clipped tags": (lambda _, y: F.avg_pool2d(y, 2).sigmoid().clamp(0.4, 0.6), "mse"),
    "pixels, classes last": (lambda _, y: F.avg_pool2d(y, 2).softmax(1).permute(0, 2, 3, 1), "kl"),
    "pixels in a row": (lambda _, y: F.avg_pool2d(y, 2).log_softmax(1).flatten(2).clamp(-50, 1), "kl"),
    "rows to pixels": (
        lambda n, y: n.one(rows(y)).softmax(-1).transpose(1, 2).reshape(y.shape[0], 5, 8, 8)[..., 2:],
        "kl",
    ),
    "one probability": (lambda n, y: n.one(pooled(y)).softmax(1)[:, 1], "kl"),
    "all but the last class": (lambda n, y: n.one(rows(y)).softmax(-1)[:, 3:, :-1], "kl"),
    "probabilities in one row": (lambda n, y: n.one(rows(y)).softmax(-1).reshape(y.shape[0], -1), "kl"),
    "probabilities, time first": (lambda n, y: n.one(rows(y)).softmax(-1).transpose(0, 1), "kl"),
    "scores, and tags of them moved": (lambda _, y: (lambda s: (s, s.flatten(1).sigmoid()))(y[:, :2]), "bce+bce"),
    "scores, and a choice of them moved": (lambda n, y: (lambda s: (s, s.transpose(1, 2).argmax(1)))(n.one(rows(y))),
                                           "kl"),
    "boxes and tags, joined": (lambda n, y: torch.cat([n.box(rows(y)), n.one(rows(y)).sigmoid()], -1), "mse+bce"),
    "boxes and scores, joined": (lambda n, y: torch.cat([n.box(rows(y)), rows(y)[..., :1], n.one(rows(y))], 2),
                                 "mse+mse+kl"),
    "maps of boxes, objects and classes, joined": (
        lambda _, y: (
            lambda z: torch.cat([z[:, :4], z[:, 4:5].sigmoid(), z.softmax(1)], 1).flatten(2).transpose(1, 2)
        )(F.avg_pool2d(y, 2)),
        "mse+bce+kl",
    ),
    "maps of boxes and scores, joined": (
        lambda _, y: (lambda z: torch.cat([z, z[:, 1:5]], 1).flatten(2).permute(0, 2, 1))(F.avg_pool2d(y, 2)),
        "kl+mse",
    ),
    "levels, joined": (
        lambda _, y: torch.cat([level(F.avg_pool2d(y, 2)), level(F.avg_pool2d(y, 4))], 2).transpose(1, 2),
        "mse+bce+mse+bce",
    ),
    "features, joined": (lambda _, y: F.avg_pool2d(torch.cat([y[:, :4], y], 1), 2), "mse"),
    "tokens, joined": (lambda _, y: torch.cat([rows(y)[:, :4], rows(y)], 1), "mse"),
}  # fmt: skip


def level(y: Tensor) -> Tensor:
    return torch.cat([y[:, :4], y[:, 2:].sigmoid()], 1).flatten(2)


def loss_and_answers(model: nn.Module, images: Tensor, asked: Any = None) -> tuple[Loss, Tensor]:
    return of_module(fxquant.capture(model, images).module, images, asked)


def of_module(module: GraphModule, images: Tensor, asked: Any = None) -> tuple[Loss, Tensor]:
    return answer_loss(asked, module, (images[:2],)), model_outputs(module, (images,))


@cache
def known(name: str) -> GraphModule:
    """Return the captured network of this name in `DEFAULTS` or `MOVED`."""
    return fxquant.capture(net((DEFAULTS | MOVED)[name][0]), IMAGES).module


@pytest.mark.parametrize("name", [*DEFAULTS, *MOVED])
def test_the_loss_that_fits(name: str) -> None:
    _, expected = (DEFAULTS | MOVED)[name]
    found, answer = of_module(known(name), IMAGES)
    assert found.name == expected
    assert not found(answer, answer).any()


@pytest.mark.parametrize(("out", "expected"), [(9, "kl"), (3, "mse")])
def test_words_are_classes_and_hidden_states_are_not(out: int, expected: str) -> None:
    found, _ = loss_and_answers(Words(out).eval(), WORDS)
    assert found.name == expected


class Recurrent(nn.Module):
    """A layer or cell with states of the class scores' shape; `run` makes the outputs."""

    def __init__(self, layer: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.head, self.run = layer, nn.Linear(5, 5), run

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.run(self, x, h, c)


def cell_of_two(n: Any, x: Tensor, h: Tensor, c: Tensor) -> Any:
    h, c = n.layer(x, (h, c))
    return n.head(F.relu(h))[:, :1].sigmoid().squeeze(1), h, c


def cell_of_one(n: Any, x: Tensor, h: Tensor, c: Tensor) -> Any:
    return n.head(state := n.layer(n.layer(x, h), c)), state


def sequence(n: Any, x: Tensor, h: Tensor, c: Tensor) -> Any:
    made, (last, cell) = n.layer(x.unsqueeze(1), (h.unsqueeze(0), c.unsqueeze(0)))
    return n.head(made[:, -1]), made[:, -1], last.squeeze(0), cell[0]


def written_out(n: Any, x: Tensor, h: Tensor, c: Tensor) -> Any:
    forget, new = n.layer(x + h).sigmoid(), n.head(h).tanh()
    return n.head(x), forget * c + (1 - forget) * new


STATES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], str]] = {
    "LSTM cell": (lambda: nn.LSTMCell(5, 5), cell_of_two, "bce+mse+mse"),
    "GRU cell": (lambda: nn.GRUCell(5, 5), cell_of_one, "kl+mse"),
    "RNN cell": (lambda: nn.RNNCell(5, 5), cell_of_one, "kl+mse"),
    "RNN cell with ReLU": (lambda: nn.RNNCell(5, 5, nonlinearity="relu"), cell_of_one, "kl+mse"),
    "LSTM": (lambda: nn.LSTM(5, 5, batch_first=True), sequence, "kl+mse+mse+mse"),
    "written out": (lambda: nn.Linear(5, 5), written_out, "kl+mse"),
    "rectified scores": (lambda: nn.Linear(5, 5), lambda n, x, h, c: F.relu(n.layer(x) * c + n.head(h)), "kl"),
    "gated scores": (lambda: nn.Linear(5, 5), lambda n, x, h, c: n.head(x) * n.layer(h).sigmoid() + c, "kl"),
}
"""Layer, outputs, their losses: states of recurrent layers are no class scores."""


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize("name", STATES)
def test_states_are_no_class_scores(name: str) -> None:
    torch.manual_seed(0)
    make, run, expected = STATES[name]
    inputs = (torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 5))
    program = fxquant.capture(Recurrent(make(), run).eval(), [inputs])
    for each in (program, Canonicalize()(program)):
        assert answer_loss(None, each.module, inputs).name == expected


def test_language_is_compared_word_by_word_by_hand() -> None:
    found, answer = loss_and_answers(Words(9).eval(), WORDS)
    changed = answer.clone()
    # At one of five positions two words of equal score become 3 : 1.
    answer[0, 2], changed[0, 2] = torch.tensor([0.0, 0.0] + [-1e9] * 7), torch.tensor([math.log(3), 0.0] + [-1e9] * 7)
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert found(answer, changed)[0].item() == pytest.approx(expected / 5)


def test_outputs_add_up_by_hand() -> None:
    head, _ = DEFAULTS["anchors beside boxes"]
    found, answer = loss_and_answers(net(head), IMAGES)
    scores, boxes = answer[:, : 64 * 5].reshape(8, 64, 5), answer[:, 64 * 5 :]
    other = torch.cat([(scores * 1.5).flatten(1), boxes * 1.1], 1)
    by_anchor = F.kl_div((scores * 1.5).log_softmax(2), scores.log_softmax(2), log_target=True, reduction="none").sum(2)
    torch.testing.assert_close(found(answer, other).float(), by_anchor.mean(1) + 0.01, rtol=1e-4, atol=1e-6)
    assert torch.equal(first_output(found, answer), scores.transpose(1, 2))


def test_a_name_is_for_the_first_output_and_names_for_the_first_ones() -> None:
    head, _ = DEFAULTS["anchors beside boxes"]
    for asked, boxes in (("mse", 0.0), ("mse+mse", 0.04)):
        found, answer = loss_and_answers(net(head), IMAGES, asked)
        scale = torch.ones_like(answer)
        scale[:, : 64 * 5], scale[:, 64 * 5 :] = 1.1, 1.2
        expected = torch.full((8,), 0.01 + boxes, dtype=torch.float64)
        torch.testing.assert_close(found(answer, answer * scale), expected, rtol=1e-3, atol=0)
    with pytest.raises(OptionError, match="has 3 names; the model has 2 float outputs"):
        loss_and_answers(net(head), IMAGES, "kl+mse+mse")


def test_a_name_is_for_all_parts_of_an_output() -> None:
    found, answer = of_module(known("boxes and tags, joined"), IMAGES, "mse")
    torch.testing.assert_close(found(answer, 1.1 * answer), torch.full((8,), 0.02, dtype=torch.float64))
    with pytest.raises(OptionError, match="has 2 names; the model has 1 float outputs"):
        of_module(known("boxes and tags, joined"), IMAGES, "mse+mse")


@pytest.mark.parametrize("name", ["anchors beside boxes", "boxes first", "time, classes last", "independent classes"])
def test_curvature_of_sums(name: str) -> None:
    found, answer = loss_and_answers(net(DEFAULTS[name][0]), IMAGES)
    shift = 1e-3 * torch.randn(answer.shape, generator=torch.Generator().manual_seed(3))
    half = found.embed(answer, shift).square().sum(1).double() / 2
    torch.testing.assert_close(half, found(answer, answer + shift), rtol=2e-2, atol=0)
    # The samples' second moment is the same Hessian: half the mean square of their products with the shift.
    for sample in (found.sample_labels, lambda y, g: found.sample(y, y, g)):
        draws = torch.stack(
            [sample(answer, [torch.Generator().manual_seed(97 * k + n) for n in range(8)]) for k in range(400)]
        )
        products = (draws * shift).flatten(2).sum(2).double()
        torch.testing.assert_close(products.square().mean() / 2, half.mean(), rtol=0.15, atol=0)


def absolute(reference: Any, output: Any, labels: Tensor | None) -> Tensor:
    """A loss without a name, of one output."""
    del labels
    far: Tensor = (reference - output).abs().flatten(1).mean(1)
    return far


def test_a_function_sees_the_outputs_as_the_model_returns_them() -> None:
    seen: list[Any] = []

    def kept(reference: Any, output: Any, labels: Tensor | None) -> Tensor:
        del output, labels
        seen.append(reference)
        return torch.zeros(8)

    for name in ("boxes first", "probabilities", "time, classes last", "independent classes", *MOVED):
        model = net((DEFAULTS | MOVED)[name][0])
        found, answer = of_module(known(name), IMAGES, kept)
        found(answer, answer)
        with torch.no_grad():
            expected = model(IMAGES)
        if "choice of them" in name:
            # Class numbers are compared by the scores, which are there already.
            expected = expected[0]
        # Images come first, whichever axis they have.
        expected = expected.transpose(0, 1) if "time first" in name else expected
        torch.testing.assert_close(seen.pop(), expected, atol=1e-4, rtol=1e-4, check_dtype=False)


def test_moved_scores_are_compared_in_place_of_moved_probabilities() -> None:
    found, answer = of_module(known("all but the last class"), IMAGES)
    model = net(MOVED["all but the last class"][0])
    with torch.no_grad():
        scores = model.one(rows(torch.relu(model.stem(IMAGES))))[:, 3:]
    torch.testing.assert_close(first_output(found, answer), scores.transpose(1, 2))


def test_a_function_gives_one_number_for_each_image() -> None:
    found, answer = loss_and_answers(net(DEFAULTS["classes"][0]), IMAGES, lambda a, b, _: (a - b).square().mean())
    with pytest.raises(CalibrationError, match=r"one number for each of 8 images, shape \(8,\), and returned \(\)"):
        found(answer, answer)


def test_pairs_of_a_function_are_second_differences() -> None:
    def squared(reference: Tensor, output: Tensor, labels: Tensor | None) -> Tensor:
        return LOSSES["mse"](reference, output, labels)

    found, known = (
        ESTIMATORS["gram"](scorer(simulated("plain"), SCORED, loss_of(loss))).values for loss in (squared, "mse")
    )
    np.testing.assert_allclose(found, known, rtol=1e-3, atol=1e-4 * np.abs(known).max())


@pytest.mark.parametrize("name", ["fisher_out", "fisher", "fit", "mpqco"])
def test_what_needs_curvature_refuses_a_function(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name}: .*needs the curvature of the loss, and 'function .*absolute'"):
        ESTIMATORS[name](scorer(simulated("plain"), SCORED, loss_of(absolute)))


@pytest.mark.parametrize("name", ["hawq", "path", "diagonal", "pairs", "monotone"])
def test_what_needs_values_or_gradients_takes_a_function(name: str) -> None:
    found = ESTIMATORS[name](scorer(simulated("plain"), SCORED, loss_of(absolute)))
    assert np.isfinite(found.values).all()


def test_a_function_decides_and_is_given_again_after_loading(tmp_path: Path) -> None:
    model, options = net(DEFAULTS["boxes first"][0]), {"loss": absolute_of_all}
    result = fxquant.quantize(model, IMAGES, {"average_bits": 5}, effort="fast", options=options, progress=False)
    name = "function tests.core.run.test_task_losses.absolute_of_all"
    assert result.allocation.loss == name
    assert result.allocation.measured_loss is not None
    result.save(tmp_path / "saved")
    plain = fxquant.load(tmp_path / "saved")
    assert torch.equal(plain.simulated(IMAGES)[0], result.simulated(IMAGES)[0])
    with pytest.raises(OptionError, match=r"absolute_of_all, which a file cannot hold; give it again: fxquant\.load"):
        fxquant.resolve(plain, {"average_bits": 6}, progress=False)
    again = fxquant.load(tmp_path / "saved", absolute_of_all)
    assert fxquant.resolve(again, {"average_bits": 6}, progress=False).allocation.loss == name


def absolute_of_all(reference: Any, output: Any, labels: Tensor | None) -> Tensor:
    """A loss without a name, of all outputs."""
    return torch.stack([absolute(a, b, labels) for a, b in zip(reference, output, strict=True)]).sum(0)


def test_images_of_sums_stay_as_they_are() -> None:
    images = CalibrationSet((IMAGES,))
    for name, mixed in (("anchors beside boxes", False), ("class of each pixel", True), ("an image", False)):
        found, _ = loss_and_answers(net(DEFAULTS[name][0]), IMAGES)
        assert (judging_images(images, found, 0) is not images) == mixed
