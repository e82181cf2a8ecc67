"""`latency`: milliseconds of a plan, from what was measured of layers and of whole networks on this machine.

    t(plan) = constant + sum over sites of t_l(float or integer) + sum over borders of b_e(direction)

A border is a link (`passes.cost.site_links`) between a float and an integer site: the value is converted, and in most
runtimes copied to another memory layout. An op timed alone pays for conversions that a network fuses away and leaves
out what a network adds, so times alone are only the prior. What decides are whole networks: the float one, the one in
integers, and a few in which stretches of sites are float. The fit has two steps, both nonnegative least squares on
relative errors: first a few common factors (float sites cost `a` times their time alone, integer ones `b` times theirs
plus `c` times the float one, a border so much and so much per element, by direction), then every single term moves from
there as far as the measurements ask for and a prior width allows. It is the maximum a posteriori of a linear Gaussian
model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxquant.core.errors import OptionError
from fxquant.core.facts import CostTable
from fxquant.core.ir import Candidate
from fxquant.passes.cost.site_links import SiteLink

FloatArray = NDArray[np.float64]

WIDTHS = {"site": 0.2, "border": 2.0}
"""Prior standard deviation of a term against its first estimate: layers differ less than borders do."""
FLOOR = 0.02
"""The least prior standard deviation of a border, as a share of the network: a border may cost what no other does."""
NOISE = 0.02
"""Relative standard deviation of a measured network."""
ENDS_NOISE = 0.002
"""The same of the two networks without borders, which the model is to hit."""
SWEEPS = 2000


@dataclass(frozen=True)
class Observation:
    """One whole network that was measured.

    Args:
        floats: sites in float; all others run in integers.
        milliseconds: above 0.

    Raises:
        OptionError: milliseconds that are not above 0.
    """

    floats: frozenset[str]
    milliseconds: float

    def __post_init__(self) -> None:
        if not self.milliseconds > 0:
            raise OptionError(f"milliseconds={self.milliseconds} of a network must be above 0")


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of every part of a plan, all at least 0.

    Args:
        floats: site -> milliseconds in float.
        integers: site -> milliseconds in integers.
        borders: link -> milliseconds where `one` is integer and `other` float, and the other way round.
        constant: what no choice changes.

    Raises:
        OptionError: sites differ between the two, or a negative time.
    """

    floats: Mapping[str, float]
    integers: Mapping[str, float]
    borders: Mapping[SiteLink, tuple[float, float]]
    constant: float

    def __post_init__(self) -> None:
        if set(self.floats) != set(self.integers):
            raise OptionError("every site needs a time in float and one in integers")
        times = [*self.floats.values(), *self.integers.values(), *sum(self.borders.values(), ()), self.constant]
        if not all(time >= 0 for time in times):
            raise OptionError("a latency model has a negative time")

    def predict(self, floats: Collection[str]) -> float:
        """Return the milliseconds of the plan with these sites in float and all others in integers."""
        total = self.constant + sum((self.floats if s in floats else self.integers)[s] for s in self.floats)
        for place, (leaving, entering) in self.borders.items():
            if (place.one in floats) != (place.other in floats):
                total += leaving if place.other in floats else entering
        return total

    def table(self, candidates: tuple[Candidate, ...]) -> CostTable:
        """Return the same over candidates: precisions that run on the same kernel cost the same time.

        Sites that the model does not know take the same time at every precision, which is part of the constant.
        """
        values = [(self.floats if c.choice.is_float else self.integers).get(c.site, 0.0) for c in candidates]
        products = np.zeros((len(candidates), len(candidates)))
        columns: dict[str, list[int]] = {}
        for index, candidate in enumerate(candidates):
            columns.setdefault(candidate.site, []).append(index)
        for place, (leaving, entering) in self.borders.items():
            for i in columns.get(place.one, ()):
                for j in columns.get(place.other, ()):
                    if candidates[i].choice.is_float != candidates[j].choice.is_float:
                        half = (entering if candidates[i].choice.is_float else leaving) / 2
                        products[i, j] += half
                        products[j, i] += half
        return CostTable(
            candidates,
            np.array(values, dtype=np.float64),
            self.constant,
            self.predict(self.floats.keys()),
            "milliseconds",
            products=products if products.any() else None,
        )


def fit_latency(
    alone: Mapping[str, tuple[float, float]], places: Sequence[SiteLink], observations: Sequence[Observation]
) -> LatencyModel:
    """Return the model that explains the measured networks best, close to the times alone.

    Args:
        alone: site -> its milliseconds alone in float and in integers, above 0.
        places: links between sites.
        observations: whole networks; those without borders, all float and all integers, are met closely.

    Raises:
        OptionError: no observation.
    """
    if not observations:
        raise OptionError("a latency model needs at least one whole network that was measured")
    names = list(alone)
    if not names:
        return LatencyModel({}, {}, {}, observations[0].milliseconds)
    terms = _terms(names, places, observations)
    times = np.array([o.milliseconds for o in observations])
    noise = np.array([ENDS_NOISE if len(o.floats) in (0, len(names)) else NOISE for o in observations]) * times
    guess = _common(np.array([alone[name] for name in names]), places)
    factors = nonnegative_least_squares(terms @ guess / noise[:, None], times / noise)
    prior, count = guess @ factors, 2 * len(names)
    width = np.concatenate([np.full(count, WIDTHS["site"]), np.full(2 * len(places) + 1, WIDTHS["border"])]) * prior
    width[count:-1] = np.maximum(width[count:-1], FLOOR * times.min())
    width = np.maximum(width, 1e-9 * times.min())
    # In units of the prior width, so that one scale fits bytes-sized borders and second-sized layers.
    system = np.concatenate([terms * width / noise[:, None], np.eye(len(width))])
    right = np.concatenate([times / noise, prior / width])
    found = nonnegative_least_squares(system, right, start=prior / width) * width
    pairs = found[count:-1].reshape(-1, 2).tolist()
    return LatencyModel(
        dict(zip(names, found[: len(names)].tolist(), strict=True)),
        dict(zip(names, found[len(names) : count].tolist(), strict=True)),
        {p: (leaving, leaving if p.joined else entering) for p, (leaving, entering) in zip(places, pairs, strict=True)},
        float(found[-1]),
    )


def _terms(names: Sequence[str], places: Sequence[SiteLink], observations: Sequence[Observation]) -> FloatArray:
    """Return which terms each observation is the sum of: sites in float, in integers, borders in pairs, constant."""
    rows = []
    for observation in observations:
        floats = [name in observation.floats for name in names]
        ends = [(place.one in observation.floats, place.other in observation.floats, place.joined) for place in places]
        # A join does not tell its two writers apart: one term for both directions, the second stays empty.
        meets = [(one != other, False) if joined else (other > one, one > other) for one, other, joined in ends]
        borders = [bit for pair in meets for bit in pair]
        rows.append([*floats, *(not is_float for is_float in floats), *borders, True])
    return np.array(rows, dtype=np.float64)


def _common(alone: FloatArray, places: Sequence[SiteLink]) -> FloatArray:
    """Return the first guess of each term as a combination of common factors, (terms, factors)."""
    count = len(alone)
    guess = np.zeros((2 * count + 2 * len(places) + 1, 13))
    guess[:count, 0] = alone[:, 0]
    guess[count : 2 * count, 1], guess[count : 2 * count, 2] = alone[:, 1], alone[:, 0]
    for index, place in enumerate(places):
        for direction in range(2):
            factor = 3 + 3 * (2 if place.joined else direction)
            guess[2 * count + 2 * index + direction, factor : factor + 3] = 1.0, place.elements, place.pooled
    guess[-1, 12] = 1.0
    return guess


def nonnegative_least_squares(system: FloatArray, right: FloatArray, start: FloatArray | None = None) -> FloatArray:
    """Return x >= 0 with the least `|system x - right|^2`, by coordinate descent.

    Args:
        system: (m, n).
        right: (m,).
        start: (n,), where to begin, zeros by default; a column of zeros keeps its start.
    """
    # Columns of one length make the descent independent of units.
    lengths = np.linalg.norm(system, axis=0)
    scale = np.where(lengths > 0, lengths, 1.0)
    gram = (system / scale).T @ (system / scale)
    aim = (system / scale).T @ right
    x = np.zeros(len(scale)) if start is None else start * scale
    for _ in range(SWEEPS):
        largest = 0.0
        for index in np.flatnonzero(lengths):
            step = max(-x[index], aim[index] - gram[index] @ x)
            x[index] += step
            largest = max(largest, abs(step))
        if largest <= 1e-10 * max(1e-300, float(np.abs(x).max(initial=0.0))):
            break
    return np.asarray(x / scale)
