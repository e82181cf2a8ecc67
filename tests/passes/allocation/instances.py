"""Problems for the allocation tests: random small ones, and the real ones of the data folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
DATA = Path(os.environ.get("FXQUANT_DATA", Path(__file__).parents[3] / "../shared/data")) / "iqp"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is absent; set FXQUANT_DATA")


@dataclass(frozen=True)
class Instance:
    """The four arrays that every solver takes."""

    values: FloatArray
    groups: list[NDArray[np.intp]]
    costs: FloatArray
    limits: FloatArray

    @property
    def arguments(self) -> tuple[FloatArray, list[NDArray[np.intp]], FloatArray, FloatArray]:
        return self.values, self.groups, self.costs, self.limits


def random_instance(seed: int, groups: int, rows: int, kind: str, tightness: float) -> Instance:
    """A seeded random problem; `kind` is convex, indefinite or diagonal, groups have two to four choices."""
    random = np.random.default_rng(seed)
    sizes = random.integers(2, 5, groups)
    count = int(sizes.sum())
    factor = random.normal(size=(count, max(count // 2, 1))) * 10.0 ** random.uniform(-2, 1, (count, 1))
    values = factor @ factor.T
    if kind == "indefinite":
        noise = random.normal(size=(count, count)) * np.abs(values).mean()
        values = values + noise + noise.T
    if kind == "diagonal":
        values = np.diag(random.normal(size=count))
    order = random.permutation(count)
    partition = [np.sort(part) for part in np.split(order, np.cumsum(sizes)[:-1])]
    costs = random.integers(-3, 12, (rows, count)).astype(np.float64)
    least = sum((costs[:, part].min(axis=1) for part in partition), np.zeros(rows))
    most = sum((costs[:, part].max(axis=1) for part in partition), np.zeros(rows))
    return Instance(values, partition, costs, np.floor(least + tightness * (most - least)))


def random_instances(kinds: tuple[str, ...] = ("convex", "indefinite", "diagonal")) -> st.SearchStrategy[Instance]:
    return st.builds(
        random_instance,
        seed=st.integers(0, 2**32 - 1),
        groups=st.integers(1, 6),
        rows=st.integers(0, 3),
        kind=st.sampled_from(kinds),
        tightness=st.floats(0.0, 1.0),
    )


def real_instance(name: str, average_bits: float) -> Instance:
    """One matrix of the data folder under a limit on average bits per weight."""
    with np.load(DATA / f"{name}.npz") as data:
        values, weights, bits = data["H"], data["weight_count"].astype(float), data["bits"].astype(float)
    groups = [np.arange(start, start + len(bits)) for start in range(0, len(values), len(bits))]
    costs = np.outer(weights, bits).reshape(1, -1)
    return Instance(values, groups, costs, np.array([average_bits * weights.sum()]))


def golden_problems() -> list[dict[str, Any]]:
    """The linear problems with published figures; empty where the data folder is absent."""
    path = DATA / "linear_golden.json"
    if not path.exists():
        return []
    problems: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["problems"]
    return problems


def golden_instance(problem: dict[str, Any]) -> Instance:
    """Two choices per layer; a tie is the pair of opposite rows x_a4 - x_b4 <= 0 and >= 0."""
    layers = len(problem["score_4bit"])
    count = 2 * layers
    scores = np.stack([problem["score_4bit"], problem["score_8bit"]], axis=1).reshape(-1)
    costs = [np.stack([problem["cost_4bit"], problem["cost_8bit"]], axis=1).reshape(-1)]
    for first, second in problem["tied"]:
        tie = np.zeros(count)
        tie[2 * first], tie[2 * second] = 1.0, -1.0
        costs += [tie, -tie]
    limits = np.zeros(len(costs))
    limits[0] = problem["limit"]
    groups = [np.array([2 * layer, 2 * layer + 1]) for layer in range(layers)]
    return Instance(np.diag(scores), groups, np.array(costs), limits)
