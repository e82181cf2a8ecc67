from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant.core.errors import OptionError
from fxquant.core.ir import FLOAT, Candidate, Choice
from fxquant.passes.allocation import SOLVERS
from fxquant.passes.cost import LatencyModel, Observation, SiteLink, fit_latency, nonnegative_least_squares

NAMES = tuple(f"layer{k}" for k in range(12))
CHAIN = [SiteLink(one, other, 100 * (k + 1)) for k, (one, other) in enumerate(itertools.pairwise(NAMES))]
PLACES = [*CHAIN, SiteLink(NAMES[1], NAMES[3], 500, joined=True)]


def truth(seed: int) -> LatencyModel:
    """Layers whose integer speed-up varies, borders that cost by element with a scatter of their own."""
    draw = random.Random(seed)
    floats = {name: draw.uniform(0.5, 3.0) for name in NAMES}
    integers = {name: time * draw.uniform(0.25, 0.6) for name, time in floats.items()}
    borders = {}
    for place in PLACES:
        down, up = (0.05 + place.elements * rate * draw.uniform(0.8, 1.2) for rate in (4e-4, 7e-4))
        borders[place] = (down, down if place.joined else up)
    return LatencyModel(floats, integers, borders, 0.3)


def observations(model: LatencyModel, count: int, seed: int, noise: float = 0.0) -> list[Observation]:
    draw = random.Random(seed)
    plans = [frozenset(NAMES), frozenset[str]()]
    plans += [frozenset(n for n in NAMES if draw.random() < 0.5) for _ in range(count)]
    return [Observation(p, model.predict(p) * draw.uniform(1 - noise, 1 + noise)) for p in plans]


def alone(model: LatencyModel, seed: int) -> dict[str, tuple[float, float]]:
    """Times alone: the float ones nearly right, the integer ones with conversions that the network does not pay."""
    draw = random.Random(seed)
    return {n: (1.1 * model.floats[n], model.integers[n] * draw.uniform(1.0, 1.2) + 0.1) for n in NAMES}


@pytest.mark.parametrize("seed", range(5))
def test_plans_that_were_not_measured_are_predicted(seed: int) -> None:
    model = truth(seed)
    found = fit_latency(alone(model, seed), PLACES, observations(model, 16, seed, noise=0.02))
    unseen = observations(model, 20, seed + 100)
    errors = [abs(found.predict(o.floats) / o.milliseconds - 1.0) for o in unseen]
    assert np.median(errors) < 0.05
    assert max(errors) < 0.15


def test_the_two_networks_without_borders_are_met() -> None:
    model = truth(0)
    seen = observations(model, 12, 0, noise=0.1)
    found = fit_latency(alone(model, 0), PLACES, seen)
    for observation in seen[:2]:
        assert found.predict(observation.floats) == pytest.approx(observation.milliseconds, rel=0.01)


def test_without_mixed_networks_layers_share_the_whole_by_their_times_alone() -> None:
    model = truth(1)
    single = {name: (time, time / 3) for name, time in model.floats.items()}
    found = fit_latency(single, (), observations(model, 0, 0))
    shares = np.array([found.floats[name] / single[name][0] for name in NAMES])
    assert shares == pytest.approx(shares.mean() * np.ones(len(NAMES)), rel=0.05)


def test_borders_that_cost_make_plans_slower_and_none_do_not() -> None:
    model = truth(2)
    free = LatencyModel(model.floats, model.integers, dict.fromkeys(PLACES, (0.0, 0.0)), 0.3)
    island = frozenset(NAMES[3:6])
    costly, cheap = (fit_latency(alone(m, 2), PLACES, observations(m, 16, 2)) for m in (model, free))
    assert sum(map(sum, costly.borders.values())) > 5 * sum(map(sum, cheap.borders.values()))
    assert costly.predict(island) > cheap.predict(island)


def candidates(names: tuple[str, ...]) -> tuple[Candidate, ...]:
    return tuple(Candidate(name, choice) for name in names for choice in (Choice(4, 8), Choice(8, 8), FLOAT))


@given(st.lists(st.sampled_from([Choice(4, 8), Choice(8, 8), FLOAT]), min_size=12, max_size=12))
def test_the_table_says_what_the_model_predicts(choices: list[Choice]) -> None:
    model = truth(3)
    plan = dict(zip(NAMES, choices, strict=True))
    floats = {name for name, choice in plan.items() if choice.is_float}
    table = model.table(candidates(NAMES))
    assert table.of(plan) == pytest.approx(model.predict(floats))
    assert table.float_cost == pytest.approx(model.predict(NAMES))
    wider = {name: Choice(8, 8) if choice == Choice(4, 8) else choice for name, choice in plan.items()}
    assert table.of(wider) == table.of(plan)


@pytest.mark.parametrize("ratio", [0.45, 0.6, 0.75])
def test_the_program_pays_for_borders_as_trying_every_plan_does(ratio: float) -> None:
    """The loss wants scattered float layers; the borders make islands of them."""
    names = NAMES[:6]
    model = truth(4)
    places = [place for place in PLACES if place.one in names and place.other in names]
    floats, integers = ({n: times[n] for n in names} for times in (model.floats, model.integers))
    small = LatencyModel(floats, integers, dict.fromkeys(places, (0.9, 0.9)), 0.0)
    table = small.table(candidates(names))
    room = ratio * table.float_cost
    assert table.products is not None
    losses = np.array([[9.0, 4.0, 0.0], [3.0, 1.0, 0.0]] * 3).ravel()
    groups = [np.arange(3 * k, 3 * k + 3) for k in range(6)]
    arguments = (np.diag(losses), groups, table.values[None, :] / room, [1.0])
    best = None
    for plan in itertools.product((Choice(4, 8), Choice(8, 8), FLOAT), repeat=6):
        chosen = dict(zip(names, plan, strict=True))
        if table.of(chosen) <= room:
            loss = sum(losses[i] for i, c in enumerate(table.candidates) if chosen[c.site] == c.choice)
            best = loss if best is None else min(best, loss)
    assert best is not None
    for name in ("iqp", "linear", "exhaustive"):
        found = SOLVERS[name](*arguments, products={0: table.products / room})
        assert found.objective == pytest.approx(best)
        picked = {c.site: c.choice for c, taken in zip(table.candidates, found.choice, strict=True) if taken}
        assert table.of(picked) <= room * (1 + 1e-9)


def test_least_squares_without_negative_parts() -> None:
    random_state = np.random.default_rng(0)
    system, known = random_state.normal(size=(30, 6)), np.array([1.0, 0.0, 2.0, 0.0, 0.5, 3.0])
    assert nonnegative_least_squares(system, system @ known) == pytest.approx(known, abs=1e-6)
    right = random_state.normal(size=30)
    found = nonnegative_least_squares(system, right)
    # The conditions of Karush, Kuhn and Tucker: x >= 0, slope >= 0, and one of the two is 0.
    slope = system.T @ (system @ found - right)
    assert (found >= 0).all()
    assert (slope > -1e-6).all()
    assert np.abs(found * slope).max() < 1e-6


def test_what_is_no_model_or_observation() -> None:
    with pytest.raises(OptionError, match="at least one whole network"):
        fit_latency({"a": (1.0, 1.0)}, (), ())
    with pytest.raises(OptionError, match="milliseconds=0"):
        Observation(frozenset(), 0.0)
    with pytest.raises(OptionError, match="one in integers"):
        LatencyModel({"a": 1.0}, {"b": 1.0}, {}, 0.0)
    with pytest.raises(OptionError, match="negative time"):
        LatencyModel({"a": 1.0}, {"a": -1.0}, {}, 0.0)
