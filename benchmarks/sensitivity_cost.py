"""What do the estimators cost: forward-equivalents and seconds, and is suffix replay exact?

`python -m benchmarks.sensitivity_cost [network ...]`: CLADO's pairs by full forwards and by suffix replay, row of the
matrix by row in turns, then `hybrid`, `gram`, `fisher` and `diagonal`, on the same images and one thread. A
forward-equivalent is the multiply-accumulates and outputs of one whole pass over one image. Where only some rows were
run, the seconds of `pairs` are scaled up by forward-equivalents, and the table says so.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.zoo import NETWORKS
from fxquant import flow
from fxquant.api import capture, prepare
from fxquant.core.facts import Settings
from fxquant.core.run import CalibrationSet
from fxquant.core.storage import ScoreStore
from fxquant.passes import simulate, widest_plan
from fxquant.passes.sensitivity import ESTIMATORS, Batch, Scorer, suffix_cost

CASES: dict[str, tuple[tuple[int, ...], int, int | None]] = {
    "resnet20": ((2, 4, 8), 16, None),
    "mobilenet_v1": ((3, 4, 5, 6, 7, 8), 8, 16),
    "mobilenet_v2": ((4, 6, 8), 4, 4),
    "deit_tiny": ((4, 6, 8), 4, 4),
}
"""Network -> weight bits, images, rows of the pair matrix that are run (None for all)."""

OTHERS = ("hybrid", "gram", "fisher", "diagonal")

Row = dict[str, str | float | None]


def deeper_columns(scorer: Scorer) -> dict[int, list[int]]:
    """Return row -> the columns it is paired with, each pair once."""
    order, owners = scorer.by_depth, scorer.owners
    return {row: [k for k in order[depth + 1 :] if owners[k] != owners[row]] for depth, row in enumerate(order)}


def pair_rows(scorer: Scorer, part: Batch, rows: list[int]) -> tuple[dict[str, float], dict[str, float], float]:
    """Return seconds and forward-equivalents of both ways over the same rows, and the largest relative difference."""
    deeper = deeper_columns(scorer)
    base = scorer.base(part)
    scorer.take_spent(1)
    seconds, spent, apart = dict.fromkeys(("full", "suffix"), 0.0), dict.fromkeys(("full", "suffix"), 0.0), 0.0
    for row in rows:
        own, answers = scorer.columns[row].substitution, {}
        for way in ("full", "suffix"):
            started = time.perf_counter()
            if way == "full":
                found = []
                for k in deeper[row]:
                    both = {**scorer.off, **own, **scorer.columns[k].substitution}
                    with torch.no_grad():
                        # As a plain run does: each value is dropped after its last reader.
                        found.append(scorer.replay.forward(part.images.inputs, both, kept=frozenset())[0])
            else:
                _, below = scorer.run(base.environment, row, keep=True)
                found = [scorer.run(below, k, on_top_of=row)[0] for k in deeper[row]]
            answers[way] = found
            seconds[way] += time.perf_counter() - started
            spent[way] += scorer.take_spent(1)
        for one, other in zip(answers["full"], answers["suffix"], strict=True):
            apart = max(apart, float((one - other).abs().max() / one.abs().max()))
    return seconds, spent, apart


def measure(name: str) -> list[Row]:
    """Return the rows of one network."""
    bits, count, limit = CASES[name]
    network = NETWORKS[name]
    calibration = CalibrationSet((network.calibration(max(count, 32)),))
    program = prepare(capture(network.factory(), calibration), Settings(bits=bits))
    program = flow.calibrate(program, calibration)
    simulated = simulate(program, widest_plan(program), round_biases=False)
    images = calibration.slice(0, count)

    def scorer() -> Scorer:
        return Scorer(simulated, images, "kl", ScoreStore(None, {}))

    each = scorer()
    each.batch = count
    part = each.batches[0]
    deeper = deeper_columns(each)
    every = [row for row, columns in deeper.items() if columns]
    picked = every if limit is None else sorted(np.random.default_rng(0).choice(every, limit, replace=False).tolist())
    seconds, spent, apart = pair_rows(each, part, picked)
    columns = len(each.columns)
    suffix = {k: suffix_cost(each, each.columns[k]) for k in range(columns)}
    pairs = sum(len(columns) for columns in deeper.values())
    totals = {
        "full": 1.0 + columns + pairs,
        "suffix": 1.0 + sum(suffix.values()) * 2 + sum(suffix[k] for found in deeper.values() for k in found),
    }
    rows: list[Row] = []
    for way, label in (("full", "pairs by full forwards"), ("suffix", "pairs by suffix replay")):
        taken = seconds[way] * totals[way] / max(spent[way], 1e-9)
        rows.append({"network": name, "estimator": label, "passes per image": totals[way], "seconds": taken})
        rows[-1] |= {"rows run": f"{len(picked)} of {len(every)}", "largest difference": apart}
    for estimator in OTHERS:
        started = time.perf_counter()
        found = ESTIMATORS[estimator](scorer())
        taken = time.perf_counter() - started
        rows.append({"network": name, "estimator": estimator, "passes per image": found.evaluations / count})
        rows[-1] |= {"seconds": taken, "rows run": None, "largest difference": None}
    full = rows[0]
    for row in rows:
        row["fewer passes"] = float(full["passes per image"] or 0) / float(row["passes per image"] or 1)
        row["times faster"] = float(full["seconds"] or 0) / float(row["seconds"] or 1)
    return rows


def main() -> None:
    """Measure, print the table, write the JSON."""
    torch.set_num_threads(1)
    rows = [row for name in asked(__doc__, "network", CASES) for row in measure(name)]
    cases = {name: {"bits": list(bits), "images": images} for name, (bits, images, _) in CASES.items()}
    write("sensitivity_cost", rows, {"cases": cases, "threads": 1, "seed": 0})


if __name__ == "__main__":
    main()
