"""What learns in place of a quantizer: where it starts, where it may end, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.core.ir import SMALLEST_SCALE, FakeQuantize, Grid, QuantSpec, weight_spec
from fxquant.passes.rounding.learned import (
    LearnedActivation,
    SoftRounding,
    StraightThrough,
    random_mask,
)

SHAPE = (5, 3, 3, 3)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight() -> Tensor:
    return torch.randn(SHAPE, generator=seeded(1))


def grid(symmetric: bool = True, share: float = 1.0) -> FakeQuantize:
    """Return a 4-bit grid per channel that holds this share of the weights' range."""
    scale = weight().flatten(1).abs().amax(dim=1) * share / 7
    zero_point = torch.zeros(5, dtype=torch.int32) if symmetric else torch.tensor([-3, -1, 0, 2, 4], dtype=torch.int32)
    return FakeQuantize(Grid(QuantSpec(4, True, symmetric, 0), scale, zero_point))


class TestSoftRounding:
    def test_starts_at_the_float_weight_where_the_grid_reaches(self) -> None:
        made = SoftRounding(weight(), grid())(torch.empty(0))
        assert torch.allclose(made, weight(), atol=float(grid().scale.max()) * 2e-4)

    def test_starts_at_the_end_of_the_grid_elsewhere(self) -> None:
        quantizer = grid(share=0.5)
        made = SoftRounding(weight(), quantizer)(torch.empty(0)).detach()
        scale = quantizer.scale.reshape(-1, 1, 1, 1)
        assert torch.allclose(made, torch.minimum(torch.maximum(weight(), -8 * scale), 7 * scale), atol=1e-3)
        assert not torch.allclose(made, weight(), atol=0.1)

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_hard_weights_are_nearest_to_begin_with(self, symmetric: bool) -> None:
        quantizer = grid(symmetric)
        assert torch.allclose(SoftRounding(weight(), quantizer).hard(), quantizer(weight()), atol=1e-6)

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_hard_weights_are_on_the_grid_within_a_step_of_the_float_ones(self, symmetric: bool) -> None:
        quantizer = grid(symmetric)
        module = SoftRounding(weight(), quantizer)
        module.logits.data = torch.randn(SHAPE, generator=seeded(2))
        hard, scale = module.hard(), quantizer.scale.reshape(-1, 1, 1, 1)
        assert torch.equal(quantizer(hard), hard)
        low, high = -8 - quantizer.zero_point.reshape(-1, 1, 1, 1), 7 - quantizer.zero_point.reshape(-1, 1, 1, 1)
        inside = (weight() > low * scale) & (weight() < high * scale)
        assert float(inside.float().mean()) > 0.5
        steps = ((hard - weight()) / scale)[inside]
        assert float(steps.abs().max()) <= 1 + 1e-5
        assert float(steps.max()) > 0.5
        assert not torch.equal(hard, quantizer(weight()))

    @pytest.mark.parametrize("beta", [20.0, 7.0, 2.0])
    def test_the_penalty_is_as_published_and_zero_where_all_is_decided(self, beta: float) -> None:
        module = SoftRounding(weight(), grid())
        expected = sum(1 - abs(2 * float(h) - 1) ** beta for h in module.directions().detach().flatten())
        assert float(module.penalty(beta).detach()) == pytest.approx(expected, rel=1e-4)
        module.logits.data = torch.full(SHAPE, 9.0)
        assert float(module.penalty(beta).detach()) == 0.0
        assert torch.equal(module(weight()), module.hard())

    def test_an_earlier_choice_is_one_end_and_the_start_is_half_way_to_it(self) -> None:
        """By hand, scale 1: w of .3, .3, .3, 1.4, -.3 and choices 0, 1, 3, 1, 0."""
        quantizer = FakeQuantize(Grid(QuantSpec(4, True, True, 0), torch.ones(1), torch.zeros(1, dtype=torch.int32)))
        values, choices = torch.tensor([[0.3, 0.3, 0.3, 1.4, -0.3]]), torch.tensor([[0.0, 1.0, 3.0, 1.0, 0.0]])
        for trust, expected in (
            (0.0, [0.3, 0.3, 2.0, 1.4, -0.3]),
            (0.5, [0.15, 0.65, 2.5, 1.2, -0.15]),
            (1.0, [0.0, 1.0, 3.0, 1.0, 0.0]),
        ):
            module = SoftRounding(values, quantizer, choices, trust)
            assert torch.allclose(module(values), torch.tensor([expected]), atol=1e-3)
        module = SoftRounding(values, quantizer, choices, 1.0)
        assert torch.equal(module.hard(), choices)
        module.logits.data = -module.logits.data
        assert torch.equal(module.hard(), torch.tensor([[1.0, 0.0, 2.0, 2.0, -1.0]]))

    def test_a_choice_at_an_end_of_the_grid_has_a_neighbour_inside_or_stays(self) -> None:
        quantizer = FakeQuantize(Grid(QuantSpec(2, True, True, 0), torch.ones(1), torch.zeros(1, dtype=torch.int32)))
        values = torch.tensor([[5.0, -5.0, 0.0]])
        module = SoftRounding(values, quantizer, torch.tensor([[1.0, -2.0, 1.0]]))
        assert torch.equal(module.below, torch.tensor([[1.0, -2.0, 0.0]]))
        assert torch.equal(module.above, torch.tensor([[1.0, -2.0, 1.0]]))

    def test_gradients_are_those_of_the_formula(self) -> None:
        module = SoftRounding(weight(), grid())
        upstream = torch.randn(SHAPE, generator=seeded(3))
        (found,) = torch.autograd.grad(module(weight()), module.logits, upstream)
        a = module.logits.detach().double()
        slope = 1.2 * torch.sigmoid(a) * (1 - torch.sigmoid(a))
        scale = grid().scale.reshape(-1, 1, 1, 1)
        q = torch.floor(weight() / scale) + module.directions().detach()
        alive = (q >= -8) & (q <= 7)
        assert torch.allclose(found.double(), upstream * scale * slope * alive, atol=1e-5)


class TestStraightThrough:
    @pytest.mark.parametrize("share", [1.0, 0.5])
    def test_starts_as_the_quantizer(self, share: float) -> None:
        quantizer = grid(share=share)
        module = StraightThrough(weight(), quantizer)
        assert torch.allclose(module(weight()), quantizer(weight()), atol=1e-6)
        assert torch.equal(module.hard(), module(weight()).detach())

    def test_what_it_ends_with_is_on_the_grid_that_it_learned(self) -> None:
        module = StraightThrough(weight(), grid())
        module.shift.data = torch.randn(SHAPE, generator=seeded(4))
        module.factor.data = torch.tensor([0.8, 0.9, 1.0, 1.1, 1.2])
        learned = FakeQuantize(Grid(module.spec, module.steps(), module.zero_point))
        assert torch.allclose(learned(module.hard()), module.hard(), atol=1e-6)
        assert not torch.allclose(grid()(module.hard()), module.hard(), atol=1e-3)

    def test_shifts_are_in_steps_and_scales_stay_above_zero(self) -> None:
        module = StraightThrough(weight(), grid())
        module.shift.data = torch.ones(SHAPE)
        assert torch.allclose(module.values() - weight(), module.scale.reshape(-1, 1, 1, 1).expand(SHAPE))
        module.factor.data = torch.full((5,), -1.0)
        assert torch.equal(module.steps(), torch.full((5,), SMALLEST_SCALE))

    def test_gradients_reach_values_and_scales(self) -> None:
        module = StraightThrough(weight(), grid())
        gradients = torch.autograd.grad(module(weight()).square().sum(), [module.shift, module.factor])
        assert all(float(gradient.abs().min(dim=0).values.max()) > 0 for gradient in gradients)


class TestLearnedActivation:
    SPEC = QuantSpec(4, False, False, None)

    def quantizer(self, point: int = 5) -> FakeQuantize:
        return FakeQuantize(Grid(self.SPEC, torch.tensor(0.25), torch.tensor(point)))

    def x(self) -> Tensor:
        return torch.randn(4, 3, 6, 6, generator=seeded(5)) * 2

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("point", [0, 5, 15])
    def test_without_drops_it_is_the_quantizer(self, point: int, training: bool) -> None:
        module = LearnedActivation(self.quantizer(point), True, 0.0, None).train(training)
        with torch.no_grad():
            assert torch.equal(module(self.x()), self.quantizer(point)(self.x()))

    @pytest.mark.parametrize("drop", [0.0, 0.5])
    def test_gradients_are_those_of_the_plain_formula_in_double(self, drop: float) -> None:
        module = LearnedActivation(self.quantizer(), True, drop, seeded(6)).train()
        x, upstream = self.x().requires_grad_(True), torch.randn(4, 3, 6, 6, generator=seeded(7))
        to_x, to_factor = torch.autograd.grad(module(x), [x, module.factor], upstream)
        mask = random_mask(self.x(), 1 - drop, seeded(6)).double() if drop else torch.ones_like(self.x()).double()
        plain, factor = self.x().double().requires_grad_(True), torch.ones((), dtype=torch.float64, requires_grad=True)
        scale = 0.25 * factor
        ratio = plain / scale
        # Straight through: rounding is the identity to the gradient.
        rounded = (ratio + (ratio.round() - ratio).detach()).clamp(0 - 5, 15 - 5) * scale
        made = mask * rounded + (1 - mask) * plain
        expected_x, expected_factor = torch.autograd.grad(made, [plain, factor], upstream.double())
        # Steps learn at the pace of LSQ; Adam does not see a constant factor.
        expected_factor = expected_factor * (plain.numel() * 15) ** -0.5
        assert torch.allclose(to_x.double(), expected_x, atol=1e-6)
        assert torch.allclose(to_factor.double(), expected_factor, rtol=1e-4)
        assert float(to_x.eq(0).float().mean()) > 0.01, "no element lies outside the grid"

    def test_the_share_of_elements_that_pass_is_the_drop(self) -> None:
        x = torch.rand(64, 64, generator=seeded(8)) * 0.9 + 0.05
        module = LearnedActivation(self.quantizer(0), True, 0.25, seeded(9)).train()
        assert float((module(x) == x).float().mean()) == pytest.approx(0.25, abs=0.05)

    def test_dropped_elements_pass_as_they_are_while_it_trains(self) -> None:
        module = LearnedActivation(self.quantizer(), True, 0.5, seeded(8)).train()
        x, mask = self.x(), random_mask(self.x(), 0.5, seeded(8))
        made = module(x).detach()
        assert torch.equal(made[mask == 0], x[mask == 0])
        assert torch.equal(made[mask == 1], self.quantizer()(x)[mask == 1])
        assert torch.equal(module.eval()(x).detach(), self.quantizer()(x))

    def test_a_step_that_is_not_to_be_learned_is_not(self) -> None:
        assert not LearnedActivation(self.quantizer(), False, 0.5, None).factor.requires_grad
        module = LearnedActivation(self.quantizer(), True, 0.5, None)
        module.factor.data = torch.tensor(-2.0)
        assert float(module.steps().detach()) == SMALLEST_SCALE


class TestRandomMask:
    @pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
    def test_share_of_ones(self, probability: float) -> None:
        mask = random_mask(torch.zeros(101, 991), probability, seeded(0))
        assert bool(((mask == 0) | (mask == 1)).all())
        assert float(mask.mean()) == pytest.approx(probability, abs=0.005)
        assert mask.shape == (101, 991)

    def test_one_seed_gives_one_mask_and_each_draw_another(self) -> None:
        like, generator = torch.zeros(3, 37), seeded(1)
        first, second = (random_mask(like, 0.5, generator) for _ in range(2))
        assert torch.equal(first, random_mask(like, 0.5, seeded(1)))
        assert not torch.equal(first, second)

    def test_elements_are_drawn_one_by_one(self) -> None:
        mask = random_mask(torch.zeros(4096, 8), 0.5, seeded(2))
        together = torch.corrcoef(mask.T)
        assert float((together - torch.eye(8)).abs().max()) < 0.08


class TestLevels:
    """The same on a grid whose levels are not evenly spaced."""

    LEVELS = torch.tensor([[-127, -40, 0, 63]] * 4 + [[-90, 0, 10, 10]], dtype=torch.int8)

    def quantizer(self) -> FakeQuantize:
        scale = weight().flatten(1).abs().amax(dim=1) / 127
        return FakeQuantize(Grid(weight_spec(8), scale, torch.zeros(5, dtype=torch.int32), self.LEVELS))

    def test_soft_rounding_lies_between_neighbouring_levels_and_ends_on_one(self) -> None:
        module, quantizer = SoftRounding(weight(), self.quantizer()), self.quantizer()
        low, high = (q * quantizer.scale.reshape(-1, 1, 1, 1) for q in quantizer.grid.neighbours(weight()))
        reach = torch.minimum(torch.maximum(weight(), low), high)
        assert torch.allclose(module(torch.empty(0)), reach, atol=float((high - low).max()) * 2e-4)
        # A tie between two levels may be broken either way.
        near = (module.hard() - weight()).abs() <= (quantizer(weight()) - weight()).abs() + 1e-5
        assert bool(near.all())
        module.logits.data = torch.randn(SHAPE, generator=seeded(2))
        assert torch.allclose(quantizer(module.hard()), module.hard(), atol=1e-6)
        assert not torch.allclose(module.hard(), quantizer(weight()), atol=1e-3)

    def test_levels_are_learned_and_end_as_int8_on_the_grid_found(self) -> None:
        quantizer = self.quantizer()
        module = StraightThrough(weight(), quantizer)
        assert torch.allclose(module(weight()), quantizer(weight()), atol=1e-6)
        assert module.moves is not None
        target = weight() * 1.1
        optimizer = torch.optim.Adam([module.moves], lr=0.02)
        before = float((module(weight()) - target).square().sum().detach())
        for _ in range(20):
            optimizer.zero_grad()
            torch.autograd.backward((module(weight()) - target).square().sum())
            optimizer.step()
        assert float((module(weight()) - target).square().sum().detach()) < 0.95 * before
        levels = module.whole_levels()
        assert levels is not None
        assert not torch.equal(levels, self.LEVELS)
        learned = FakeQuantize(Grid(module.spec, module.steps().detach(), module.zero_point, levels))
        assert torch.allclose(learned(module.hard()), module.hard(), atol=1e-6)

    def test_directions_and_levels_are_learned_together_and_end_on_the_grid_found(self) -> None:
        quantizer = self.quantizer()
        module = SoftRounding(weight(), quantizer, learn=True)
        assert module.moves is not None
        target = weight() * 1.1
        optimizer = torch.optim.Adam([module.moves, module.factor, module.logits], lr=0.02)
        before = float((module(weight()) - target).square().sum().detach())
        for _ in range(20):
            optimizer.zero_grad()
            torch.autograd.backward((module(weight()) - target).square().sum())
            optimizer.step()
        assert float((module(weight()) - target).square().sum().detach()) < 0.8 * before
        levels = module.whole_levels()
        assert levels is not None
        assert not torch.equal(levels, self.LEVELS)
        learned = FakeQuantize(Grid(module.spec, module.steps().detach(), module.zero_point, levels))
        assert torch.allclose(learned(module.hard()), module.hard(), atol=1e-6)
        assert not torch.equal(module.steps(), quantizer.scale)
