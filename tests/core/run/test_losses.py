from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.core.errors import CalibrationError
from fxquant.core.run import LOSSES, UNITS

G = torch.Generator().manual_seed(0)
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "kl": [(4, 6), (4, 6, 5), (4, 6, 2, 3)],
    "mse": [(4,), (4, 1), (4, 6), (4, 3, 2, 2)],
    "ce": [(4, 6)],
    "bce": [(4, 6), (4, 1, 3), (4, 6, 2, 3)],
}
LABELS = torch.tensor([0, 5, 2, 1])
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_zero_at_the_float_model_one_value_per_image(name: str, shape: tuple[int, ...]) -> None:
    reference = torch.randn(shape, generator=G)
    loss = LOSSES[name](reference, reference.clone(), LABELS)
    assert loss.shape == (4,)
    assert loss.dtype == torch.float64
    assert not loss.any()
    assert name in UNITS


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if case[0] != "ce"])
def test_images_do_not_see_each_other(name: str, shape: tuple[int, ...]) -> None:
    reference, output = torch.randn(shape, generator=G), torch.randn(shape, generator=G)
    loss = LOSSES[name](reference, output, None)
    assert bool((loss > 0).all())
    alone = torch.cat([LOSSES[name](reference[i : i + 1], output[i : i + 1], None) for i in range(4)])
    assert torch.allclose(loss, alone, rtol=1e-12)


def test_kl_agrees_with_torch_and_averages_positions() -> None:
    reference, output = torch.randn(3, 5, 7, generator=G), torch.randn(3, 5, 7, generator=G)
    p, q = reference.double().log_softmax(1), output.double().log_softmax(1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(1).mean(1)
    assert torch.allclose(LOSSES["kl"](reference, output, None), expected)
    shifted = LOSSES["kl"](reference, reference + 3.0, None)
    assert float(shifted.abs().max()) < 1e-6, "a constant added to all logits changes nothing"


def test_kl_survives_extreme_logits() -> None:
    loss = LOSSES["kl"](torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[-1e4, 0.0, 1e4]]), None)
    assert float(loss) == pytest.approx(2e4)


def test_cross_entropy_agrees_with_torch() -> None:
    reference, output = torch.randn(4, 6, generator=G), torch.randn(4, 6, generator=G)
    one, other = (torch.nn.functional.cross_entropy(x.double(), LABELS, reduction="none") for x in (output, reference))
    assert torch.allclose(LOSSES["ce"](reference, output, LABELS), one - other)


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((4, 6), None, "needs labels; give calibration batches as"),
        ((4, 6), LABELS + 1, r"labels lie in 1\.\.6, the model knows classes 0\.\.5"),
        ((4, 6), LABELS - 1, r"labels lie in -1\.\.4"),
        ((4, 6, 2), LABELS, r"needs outputs \(images, classes\), not \(4, 6, 2\)"),
    ],
)
def test_what_cross_entropy_cannot_take(shape: tuple[int, ...], labels: torch.Tensor | None, message: str) -> None:
    x = torch.zeros(shape)
    with pytest.raises(CalibrationError, match=message):
        LOSSES["ce"](x, x, labels)


def test_relative_mse_of_a_silent_reference_is_finite() -> None:
    assert bool(torch.isfinite(LOSSES["mse"](torch.zeros(2, 3), torch.ones(2, 3), None)).all())
    assert float(LOSSES["mse"](torch.full((1, 2), 2.0), torch.full((1, 2), 3.0), None)) == 0.25


@given(st.sampled_from([c for c in CASES if c[0] != "ce"]), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_embedding_is_the_loss_to_second_order(case: tuple[str, tuple[int, ...]], seed: int) -> None:
    name, shape = case
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(shape, generator=generator, dtype=torch.float64)
    shift = 1e-4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    embedded = LOSSES[name].embed(reference, shift)
    assert embedded.dim() == 2
    half = embedded.square().sum(1) / 2
    assert torch.allclose(half, LOSSES[name](reference, reference + shift, None), rtol=1e-2, atol=1e-14)


@pytest.mark.parametrize("shape", [(4,), (3, 2, 2)])
@pytest.mark.parametrize("loss", ["kl", "ce", "mse", "bce"])
def test_sampled_cotangents_have_the_hessian_as_their_second_moment(loss: str, shape: tuple[int, ...]) -> None:
    one = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    answer, count = one.expand(20_000, *shape), 20_000
    generators = [torch.Generator().manual_seed(k) for k in range(count)]
    drawn = LOSSES[loss].sample(answer, answer, generators).flatten(1).double()
    moment = drawn.T @ drawn / count
    if loss in ("kl", "ce"):
        labelled = LOSSES[loss].sample_labels(answer, generators).flatten(1).double()
        torch.testing.assert_close(labelled.T @ labelled / count, moment, atol=0.02, rtol=0.05)
    unlabelled = "kl" if loss == "ce" else loss

    def value(x: torch.Tensor) -> torch.Tensor:
        return LOSSES[unlabelled](one.double(), x.reshape(one.shape), None).sum()

    point = one.double().flatten().requires_grad_()
    (slope,) = torch.autograd.grad(value(point), point, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(each, point, retain_graph=True)[0] for each in slope])
    torch.testing.assert_close(moment, hessian, atol=0.02, rtol=0.05)


def test_signs_need_fewer_images_than_sampled_labels_where_the_answer_is_confident() -> None:
    answer = torch.tensor([[5.0, 0.0, 0.0]]).expand(2000, 3)
    generators = [torch.Generator().manual_seed(k) for k in range(2000)]
    direction = torch.tensor([0.0, 1.0, -1.0])

    def spread(drawn: torch.Tensor) -> float:
        squares = (drawn @ direction).double().square()
        return float(squares.std() / squares.mean())

    by_signs = spread(LOSSES["kl"].sample(answer, answer, generators))
    by_labels = spread(LOSSES["kl"].sample_labels(answer, generators))
    assert by_labels > 5 * by_signs


def test_independent_classes_by_hand() -> None:
    reference, output = torch.tensor([[[0.0, math.log(3)]]]), torch.tensor([[[math.log(3), 0.0]]])
    one, other = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(LOSSES["bce"](reference, output, None)) == pytest.approx((one + other) / 2)
    assert float(LOSSES["bce"](reference, reference + 1, None)) > 0, "unlike softmax, a sigmoid sees a constant added"
    assert float(LOSSES["bce"](torch.tensor([[800.0]]), torch.tensor([[-800.0]]), None)) == pytest.approx(800)
