"""Which verdict picks the best plan: on how many and which images, at which temperature, with which margin?

`python -m benchmarks.verdict [network ...]` measures what is missing (`benchmarks.verdict_answers`), and judges the
plans of all networks that are there. A judge is a kind of images (plain, shifted and flipped, mixed in pairs), a set of
them (the held-out quarter of the calibration images, all of them, some of all), a temperature T of the KL, a margin in
paired standard errors, and a number of plans it looks at in the order of a surrogate. It starts at the surrogate's plan
and leaves its plan for the next one that is better by more than the margin; in a race, plans that are clearly worse on
a share of the images are not run on the others. Measured on test images:
`regret %`, by how much the KL of the plan picked exceeds that of the best plan at hand, and `top-1 lost`, accuracy of
that best plan less that of the plan picked; means over three budgets, five calibration seeds and twenty random halves
of the plans for each network, then over networks. `rho` is Spearman's correlation with the test KL over all plans of a
budget, `rho better` over the better half.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.verdict_answers import CASES, FOLDER, KINDS, SEEDS, WIDTHS, Answers, answers_at, collect
from fxquant.core.storage import read_arrays, read_json

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Row = dict[str, str | float | None]

TEMPERATURES = (1.0, 2.0, 4.0)
MARGINS = (0.0, 1.0, 2.0, 3.0)
LOOKS = (4, 8, 12)
PRIOR = "diagonal"
"""Surrogate in whose order plans are looked at, and whose best plan a margin protects."""
HEAT_MARGIN = 1.0
HALVES = 20
FEWEST = 8
"""Plans that a budget needs to be counted."""


@dataclass(frozen=True)
class Judge:
    """What decides between plans.

    Args:
        kind: of images, one of `KINDS`, or "crossed, ..." where each half answers with weights rounded on the other.
        images: "held out", "all", "half of all", "quarter of all" or "tuning".
        temperature: of the KL; 0 for the squared error of the logits.
        margin: in paired standard errors.
        looks: plans looked at, 0 for all.
        race: share of the images on which a plan is dropped if it is clearly worse; 0 runs all images.
    """

    kind: str = "plain"
    images: str = "held out"
    temperature: float = 1.0
    margin: float = 0.0
    looks: int = 0
    race: float = 0.0


TODAY = Judge()
POOLED = {
    "plain and mixed": (("plain", ""), ("mixed", "")),
    "mixed twice": (("mixed", ""), ("shifted, mixed", "")),
    "mixed, and held out": (("mixed", ""), ("plain", "held out")),
    "shifted, mixed, and held out": (("shifted, mixed", ""), ("plain", "held out")),
}
"""Kinds put together: a kind, and its set of images where that is not the judge's own."""


def kinds_of(judge: Judge) -> tuple[tuple[str, str], ...]:
    """Return the kinds of images that a judge sees, each with the name of a set."""
    pooled = POOLED.get(judge.kind, ((judge.kind, ""),))
    return tuple((kind, images or judge.images) for kind, images in pooled)


@dataclass(frozen=True, eq=False)
class Field:
    """The plans of one network at one budget.

    Args:
        network: name.
        budget: average bits.
        truth: KL on test images, shape (plans,).
        accuracy: top-1 on test images in percent, shape (plans,).
        modelled: modelled loss of the preferred surrogate, shape (plans,).
        losses: (kind, temperature) -> loss of each plan on each image, shape (plans, images).
        picks: images -> positions of each seed's judging images.
    """

    network: str
    budget: str
    truth: Floats
    accuracy: Floats
    modelled: Floats
    losses: dict[tuple[str, float], Floats]
    picks: dict[str, list[Indices]]


def softened(reference: Answers, answers: Answers, temperature: float) -> Floats:
    """Return `T^2 KL(softmax(reference / T) || softmax(answers / T))` of each image; T = 0 is its limit at large T."""
    a, b = reference.astype(np.float64), answers.astype(np.float64)
    if not temperature:
        shift = b - a
        centred = shift - shift.mean(axis=1, keepdims=True)
        return np.asarray(0.5 * np.square(centred).mean(axis=1))
    p, q = (_log_softmax(x / temperature) for x in (a, b))
    return np.asarray(temperature**2 * (np.exp(p) * (p - q)).sum(axis=1))


def _log_softmax(x: Floats) -> Floats:
    x = x - x.max(axis=1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=1, keepdims=True)))


def seeds_of(name: str) -> dict[str, list[Indices]]:
    """Return name of a set of images -> positions, for each calibration seed.

    A seed's held-out images are its own; the images it tunes on are three times as many of the network's.
    """
    case = CASES[name]
    found: dict[str, list[Indices]] = {}
    for seed in range(SEEDS):
        draw = np.random.default_rng(seed)
        held = np.arange(case.block) + case.tuning + seed * case.block
        tuning = np.sort(draw.permutation(case.tuning)[: 3 * case.block])
        every = np.concatenate([tuning, held])
        mixed = draw.permutation(every)
        sets = {"held out": held, "all": every, "tuning": tuning}
        sets |= {"half of all": mixed[: len(every) // 2], "quarter of all": mixed[: len(every) // 4]}
        for key, value in sets.items():
            found.setdefault(key, []).append(value)
    return found


@cache
def fields(name: str) -> tuple[Field, ...]:
    """Return the plans of a network that have been run, budget by budget."""
    if not (FOLDER / name / "plans.json").exists():
        return ()
    reference, picks, found = read_arrays(FOLDER / name / "float.npz"), seeds_of(name), []
    labels = reference["labels"]
    for bits, plans in read_json(FOLDER / name / "plans.json", "verdict plans", 1)["budgets"].items():
        rows: dict[tuple[str, float], list[Floats]] = {}
        truth, accuracy, modelled = [], [], []
        for number, answers in answers_at(name, bits).items():
            truth.append(softened(reference["test"], answers["test"], 1.0).mean())
            accuracy.append(100 * (answers["test"].argmax(axis=1) == labels).mean())
            modelled.append(plans[number]["modelled"][PRIOR])
            for kind in answers.keys() - {"test"}:
                floats = reference[kind.removeprefix("crossed, ")][: len(answers[kind])]
                for temperature in (*TEMPERATURES, 0.0):
                    rows.setdefault((kind, temperature), []).append(softened(floats, answers[kind], temperature))
        if len(truth) >= FEWEST:
            losses = {key: np.stack(each) for key, each in rows.items()}
            found.append(Field(name, bits, np.array(truth), np.array(accuracy), np.array(modelled), losses, picks))
    return tuple(found)


def picked(losses: Floats, order: Indices, judge: Judge) -> tuple[int, float]:
    """Return the number of the plan picked, and the share of the images it took.

    The first plan in the order is left for each later one that is better by the margin. In a race a plan that is worse
    by `HEAT_MARGIN` standard errors on the first images is not run on the others.

    Args:
        losses: what the judge sees, shape (plans, images).
        order: numbers of the plans looked at.
        judge: its margin and race count here.
    """
    now, heat, run = order[0], round(judge.race * losses.shape[1]), losses.shape[1]
    for plan in order[1:]:
        fall = losses[now] - losses[plan]
        run += heat or len(fall)
        if heat and fall[:heat].mean() < -HEAT_MARGIN * standard_error(fall[:heat]):
            continue
        run += len(fall) - heat if heat else 0
        if fall.mean() > judge.margin * standard_error(fall):
            now = plan
    return int(now), run / (len(order) * losses.shape[1])


def standard_error(values: Floats) -> float:
    """Return the standard error of a mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def at_hand(field: Field) -> list[Indices]:
    """Return random halves of a budget's plans, each in the order of the prior."""
    order, count = np.argsort(field.modelled, kind="stable"), len(field.truth)
    draws = (np.random.default_rng(number).permutation(count)[: (count + 1) // 2] for number in range(HALVES))
    return [order[np.isin(order, draw)] for draw in draws]


def seen(field: Field, judge: Judge, seed: int) -> Floats:
    """Return the losses that a judge sees, shape (plans, images)."""
    seen_by = []
    for kind, images in kinds_of(judge):
        losses, where = field.losses[kind, judge.temperature], field.picks[images][seed]
        # Only tuning images have been answered crosswise.
        seen_by.append(losses[:, where[where < losses.shape[1]]])
    return np.concatenate(seen_by, axis=1)


def ranks(values: Floats) -> Floats:
    """Return the rank of each value."""
    return np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(np.float64)


def rho(first: Floats, second: Floats) -> float:
    """Return Spearman's rank correlation."""
    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def result(judge: Judge, field: Field) -> dict[str, float]:
    """Return the means of a judge over the seeds and the halves of the plans at one budget."""
    better, found = field.truth <= np.median(field.truth), defaultdict[str, list[float]](list)
    for seed in range(SEEDS):
        losses = seen(field, judge, seed)
        # Tuning images come first among all; a heat is of both.
        losses = losses[:, np.random.default_rng(seed).permutation(losses.shape[1])]
        means = losses.mean(axis=1)
        found["rho"].append(rho(means, field.truth))
        found["rho better"].append(rho(means[better], field.truth[better]))
        for order in at_hand(field):
            best = order[field.truth[order].argmin()]
            plan, share = picked(losses, order[: judge.looks or None], judge)
            found["images run"].append(share * losses.shape[1])
            found["regret %"].append(100 * (field.truth[plan] / field.truth[best] - 1))
            found["top-1 lost"].append(field.accuracy[best] - field.accuracy[plan])
    return {key: float(np.mean(values)) for key, values in found.items()}


def judges() -> Iterator[Judge]:
    """Yield the judges compared: all kinds, sets and temperatures without margin; margins and looks for some."""
    sets = ("held out", "all", "half of all", "quarter of all")
    for kind in (*KINDS, *POOLED):
        for images in sets:
            for temperature in (*TEMPERATURES, 0.0):
                yield Judge(kind, images, temperature)
    yield from (Judge(crossed + kind, "tuning") for kind in ("plain", "mixed") for crossed in ("", "crossed, "))
    best = (Judge("mixed", "all"), Judge("mixed, and held out", "all"))
    for base in (TODAY, Judge("plain", "all"), *best):
        yield from (replace(base, margin=margin) for margin in MARGINS[1:])
        yield from (replace(base, looks=looks, margin=margin) for looks in LOOKS for margin in MARGINS[:2])
    yield from (replace(base, race=race) for base in best for race in (0.125, 0.25))


def row(judge: Judge, found: list[Field]) -> Row:
    """Return a judge's row: means over networks, and the regret of each network."""
    networks: dict[str, list[dict[str, float]]] = {}
    for field in found:
        if all((kind, judge.temperature) in field.losses for kind, _ in kinds_of(judge)):
            networks.setdefault(field.network, []).append(result(judge, field))
    each = {
        name: {key: float(np.mean([r[key] for r in results])) for key in results[0]}
        for name, results in networks.items()
    }
    line: Row = {"images": judge.kind, "of": judge.images, "T": judge.temperature or None, "margin": judge.margin}
    line |= {"plans seen": float(judge.looks) if judge.looks else None, "race": judge.race or None}
    for key in ("regret %", "top-1 lost", "rho", "rho better", "images run"):
        line[key] = float(np.mean([r[key] for r in each.values()]))
    line["networks"] = float(len(each))
    return line | {f"{name} %": r["regret %"] for name, r in each.items()}


def report() -> None:
    """Print the table and write the JSON of what has been measured."""
    found = [field for name in CASES for field in fields(name)]
    rows = sorted((row(judge, found) for judge in judges()), key=lambda line: float(line["regret %"] or 0.0))
    plans = {f"{field.network} {field.budget}": len(field.truth) for field in found}
    cases = {
        name: {"tuning": case.tuning, "held out": case.block, "test": case.test}
        for name, case in CASES.items()
        if fields(name)
    }
    best = {f"{field.network} {field.budget}": float(field.truth.min()) for field in found}
    meta = {"seeds": SEEDS, "halves of the plans": HALVES, "plans": plans, "KL of the best": best, "images": cases}
    write("verdict", rows, meta | {"prior": PRIOR, "T": "empty: squared error of the logits", "widths": WIDTHS})


def main() -> None:
    """Measure what is missing, print the table, write the JSON."""
    for name in asked(__doc__, "network", CASES):
        collect(name)
    report()


if __name__ == "__main__":
    main()
