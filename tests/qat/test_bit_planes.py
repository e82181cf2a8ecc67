"""Bit planes: values, slopes, what is dropped, and the widths of a plan, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.core.ir import FakeQuantize, Grid, weight_spec
from fxquant.qat import BitPlanes

STEP = 0.25


def planes(integers: list[list[int]], bits: int = 4) -> BitPlanes:
    count = len(integers)
    grid = Grid(weight_spec(bits), torch.full((count,), STEP), torch.zeros(count, dtype=torch.int32))
    return BitPlanes(torch.tensor(integers) * STEP, FakeQuantize(grid), 1e-3, 1e-3)


def value(form: BitPlanes) -> Tensor:
    found: Tensor = form(torch.zeros(()))
    return found.detach()


def test_a_weight_is_the_signed_sum_of_its_planes() -> None:
    form = planes([[2, -1, 3, 0]])
    # `2^b (P_b - N_b)`.
    assert form.planes[:, 0].tolist() == [[0, -1, 1, 0], [2, 0, 2, 0], [0, 0, 0, 0]]
    assert value(form).tolist() == [[0.5, -0.25, 0.75, 0.0]]
    assert form.norms().tolist() == pytest.approx([2**0.5, 2**0.5, 0.0], abs=1e-5)
    assert form.width == 4


def test_the_lopsided_end_of_a_signed_grid_is_clipped() -> None:
    assert planes([[-8, 7, 9]]).integers().tolist() == [[-7, 7, 7]]


def test_slopes_pass_the_rounding() -> None:
    form = planes([[2, -1, 3, 0]])
    with torch.no_grad():
        # 2.6 rounds to 3.
        form.planes[1, 0, 0] = 2.6
    out = form(torch.zeros(()))
    assert out[0, 0] == 3 * STEP
    along = torch.tensor([[1.0, -2.0, 0.5, 4.0]])
    torch.autograd.backward(out, along)
    assert form.planes.grad is not None
    for plane in range(3):
        # By `P_b` it is 2^b times this.
        assert torch.equal(form.planes.grad[plane], STEP * along)
    assert form.step.grad is not None
    assert float(form.step.grad) == pytest.approx(3 * 1.0 + 1 * 2.0 + 3 * 0.5)


def test_planes_of_zeros_are_dropped_and_nothing_else_changes() -> None:
    form = planes([[2, -2, 4, 0]], bits=5)
    before = value(form)
    form.requantize()
    # Of planes 0 to 3 the lowest and the highest hold no bit.
    assert (list(form.live), form.width) == ([1, 2], 3)
    assert torch.equal(value(form), before)
    assert torch.equal(form.weight(), before)


def test_a_carry_does_not_grow_the_width() -> None:
    form = planes([[7, 1]])
    with torch.no_grad():
        form.planes[:, 0, 0] = torch.tensor([2.0, 4.0, 8.0])
    form.requantize()
    assert form.integers().tolist() == [[7, 1]]


@pytest.mark.parametrize(
    ("integers", "left", "live"),
    [
        # Rounded to even: errors 1, 1, 0, 0, clipped to 3: 2, 0, 0, 4.
        ([[5, -3, 0, 6]], [[4, -4, 0, 6]], [1, 2]),
        # Rounding would cost 1 for each of five weights, clipping 1 for one.
        ([[4, 1, -1, 3, -3]], [[3, 1, -1, 3, -3]], [0, 1]),
    ],
)
def test_the_cheaper_of_rounding_and_clipping(
    integers: list[list[int]], left: list[list[int]], live: list[int]
) -> None:
    form = planes(integers)
    error = form.error_narrower()
    form.requantize(narrower=True)
    assert form.integers().tolist() == left
    assert list(form.live) == live
    assert torch.allclose(error, (torch.tensor(left) - torch.tensor(integers)) * STEP)


def test_a_later_rounding_is_of_the_weight_and_not_of_its_integers() -> None:
    form = planes([[2, 6, -2, 0]])
    with torch.no_grad():
        form.planes[0, 0, :2] = torch.tensor([0.9, -0.9])
    # 2.9 and 5.1 round to 3 and 5, and without the lowest plane both to 4 or 2, whichever is nearer.
    form.requantize()
    assert form.integers().tolist() == [[3, 5, -2, 0]]
    assert torch.allclose(form.weight(), torch.tensor([[2.9, 5.1, -2.0, 0.0]]) * STEP)
    form.requantize(narrower=True)
    assert form.integers().tolist() == [[2, 6, -2, 0]]


def test_the_last_plane_stays() -> None:
    form = planes([[1, 0, -1]], bits=2)
    form.requantize(narrower=True)
    assert form.width == 2
    assert value(form).tolist() == [[STEP, 0.0, -STEP]]
    dead = planes([[0, 0]])
    dead.requantize()
    assert dead.width == 2


def test_the_penalty_shrinks_low_planes_first() -> None:
    form = planes([[1, 3, -3, 2]])
    form.shrink(0.1)
    assert value(form).tolist() == [[0.25, 0.75, -0.75, 0.5]], "no plane shrinks at the wanted width"
    _ = form.wanted.fill_(2)
    before = form.planes.detach().clone()
    form.shrink(0.1)
    # Plane 0 holds 3 of 4 bits, rms(P_0) = sqrt(3) / 2; plane 1 as many, shrinks by a quarter of it.
    rms = (3 / 4) ** 0.5
    assert torch.allclose(form.planes[0], before[0] * (1 - 0.1 / rms))
    assert torch.allclose(form.planes[1], before[1] * (1 - 0.025 / rms))
    form.shrink(2.0)
    assert bool((form.planes[0] == 0).all())
    kept = planes([[1, 3, -3, 2]])
    _ = kept.wanted.fill_(3)
    kept.shrink(2.0)
    assert value(kept).tolist() == [[0.0, 0.5, -0.5, 0.5]], "only as many planes as must go"


def test_elements_stay_between_0_and_2() -> None:
    form = planes([[1, 3, -3, 2]])
    with torch.no_grad():
        form.planes[1, 0, 0], form.planes[2, 0, 1] = 9.0, -11.0
    form.shrink(0.0)
    assert float(form.planes[1, 0, 0].detach()) == 4.0
    assert float(form.planes[2, 0, 1].detach()) == -8.0
