"""What does an iteration of PD-Quant take, written plainly in eager PyTorch against the engine here?

`python -m benchmarks.reconstruction_cost`: both run the faithful settings (arXiv 2212.07048 as its authors' code has
them: batch 32, mixed inputs, activations dropped, prediction through the float suffix, rounding regulariser) on units
of ResNet-20 at W4A4. Their losses are compared first where nothing is drawn but the batches (no drop, inputs from the
quantized network), then iterations are timed in turn, a few of each at a time. Distribution correction is timed on its
own: plainly for every configuration, here once for all. `overall` adds up 20,000
iterations of each unit timed and its correction of 1024 images, for one configuration and for twelve (four widths,
three seeds).
The plain side has the same convolutions, frozen and folded: what differs is how quantizers, masks, losses and
optimizers are written, and what is done more than once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.rounding import prepared
from fxquant.core.facts import Statistics
from fxquant.core.run import Span, cut_span
from fxquant.passes.rounding import RoundingTask
from fxquant.passes.rounding.learned import (
    BETA,
    EPSILON,
    MIX,
    PROFILES,
    Cut,
    LearnedActivation,
    Outcome,
    Reconstruction,
    Reconstructor,
    SoftRounding,
    Source,
    Tuner,
    corrected_inputs,
)

FAITHFUL = PROFILES["pdquant-faithful"].stages["pdquant-faithful"]
FAST = PROFILES["fast"].stages["fast"]
UNITS = (1, 4, 7, 9)
"""Positions of the units that are timed: a block of each width, and the last."""
TURNS, STEPS = 5, 3
"""Times that each side has its turn, and iterations of a turn."""
CORRECTIONS = 6
IMAGES = 128
FULL_ITERATIONS, FULL_IMAGES, FULL_CORRECTION, CONFIGURATIONS = 20000, 1024, 500, 12
AGREEMENT = 1e-3


class PlainRounding(nn.Module):
    """AdaRound as one writes it down."""

    def __init__(self, start: SoftRounding) -> None:
        super().__init__()
        self.base, self.top = start.below, start.above
        self.scale = start.steps().detach().reshape(-1, *[1] * (self.base.dim() - 1))
        self.alpha = nn.Parameter(start.logits.detach().clone())

    def h(self) -> Tensor:
        """Return the rounding directions."""
        return torch.clamp(torch.sigmoid(self.alpha) * 1.2 - 0.1, 0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the soft weight."""
        del weight
        return torch.minimum(self.base + self.h(), self.top) * self.scale


class PlainActivation(nn.Module):
    """A learned step and dropped quantization, as one writes them down."""

    def __init__(self, start: LearnedActivation, drop: float) -> None:
        super().__init__()
        self.spec, self.zero, self.drop = start.spec, start.zero_point, drop
        self.delta = nn.Parameter(start.steps().detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return x quantized, or some of it."""
        ratio = x / self.delta
        integers = (torch.round(ratio) - ratio).detach() + ratio
        q = torch.clamp(integers + self.zero, self.spec.qmin, self.spec.qmax)
        y = (q - self.zero) * self.delta
        return torch.where(torch.rand_like(x) < self.drop, x, y) if self.drop else y


class Plain:
    """The faithful loop for one unit.

    Args:
        tuner: the engine's, of whose unit, material and options this is the plain version; its modules are copied.
        places: puts modules in the place of the unit's quantizers, by the names they are learned under.
    """

    def __init__(self, tuner: Tuner, places: Callable[[dict[str, nn.Module]], Span]) -> None:
        self.options, self.material, self.pieces = tuner.options, tuner.material, tuner.pieces
        made: dict[str, nn.Module] = {}
        for name, module in tuner.pieces.learned.items():
            if isinstance(module, SoftRounding):
                made[name] = PlainRounding(module)
            if isinstance(module, LearnedActivation):
                made[name] = PlainActivation(module, self.options.drop)
        self.made, self.unit = made, places(made)
        self.rounds = [m for m in made.values() if isinstance(m, PlainRounding)]
        steps = [m.delta for m in made.values() if isinstance(m, PlainActivation)]
        self.weights = torch.optim.Adam([m.alpha for m in self.rounds], lr=self.options.rounding_lr)
        self.steps = torch.optim.Adam(steps, lr=self.options.step_lr) if steps else None
        total = self.options.iterations
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.steps, total) if self.steps else None

    def hand_over(self, tuner: Tuner) -> None:
        """Copy the current parameters into the engine's modules."""
        with torch.no_grad():
            for name, module in self.made.items():
                ours = tuner.pieces.learned[name]
                if isinstance(module, PlainRounding) and isinstance(ours, SoftRounding):
                    ours.logits.copy_(module.alpha)
                if isinstance(module, PlainActivation) and isinstance(ours, LearnedActivation):
                    ours.factor.copy_(module.delta / ours.start)

    def step(self, index: Tensor, iteration: int) -> float:
        """Take one step on these images and return the loss without the regulariser."""
        options, material = self.options, self.material
        quantized, floats = material.quantized(index), material.floats(index)
        targets, reference = material.targets(index), material.answers(index)
        mixed = quantized
        if options.inputs == "mixed":
            mixed = {n: torch.where(torch.rand_like(x) < MIX, quantized[n], x) for n, x in floats.items()}
        both = self.unit({n: torch.cat([mixed[n], quantized[n]]) for n in self.unit.inputs})
        count = len(index)
        loss = torch.zeros(())
        for name, target in targets.items():
            loss = loss + (both[name][:count] - target).pow(2).sum(1).mean()
        values = {**quantized, **{name: value[count:] for name, value in both.items()}}
        answer = (self.pieces.suffix(values) if self.pieces.suffix is not None else values)[self.pieces.answer]
        p = F.softmax(reference[self.pieces.answer] / options.temperature, dim=1)
        q = F.log_softmax(answer / options.temperature, dim=1)
        loss = loss + options.prediction * F.kl_div(q, p, reduction="batchmean")
        passed = iteration / options.iterations
        total = loss
        if passed >= options.warmup:
            share = (passed - options.warmup) / (1 - options.warmup)
            beta = BETA[1] + (BETA[0] - BETA[1]) * (1 - share)
            for module in self.rounds:
                total = total + options.regulariser * (1 - (2 * module.h() - 1).abs().pow(beta)).sum()
        self.weights.zero_grad()
        if self.steps is not None:
            self.steps.zero_grad()
        torch.autograd.backward(total)
        self.weights.step()
        if self.steps is not None and self.schedule is not None:
            self.steps.step()
            self.schedule.step()
        return float(loss.detach())


def plain_correction(span: Span, inputs: dict[str, Tensor], known: dict[str, Statistics], steps: int) -> None:
    """Correct a batch as the authors' loop does, statistics read back at every step."""
    moved = {name: value.clone().requires_grad_(True) for name, value in inputs.items()}
    optimizer = torch.optim.Adam(list(moved.values()), lr=1e-3)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=1e-5, patience=100)
    for _ in range(steps):
        loss = torch.zeros(())
        for name, value in span(moved).items():
            k = known[name]
            unfolded = (value - k.shift.view(1, -1, 1, 1)) / k.factor.view(1, -1, 1, 1) + k.mean.view(1, -1, 1, 1)
            flat = unfolded.flatten(2)
            loss = loss + (flat.mean(2) - k.mean).pow(2).sum(1).mean()
            spread = torch.sqrt(flat.var(2) + EPSILON) - torch.sqrt(k.variance + EPSILON)
            loss = loss + spread.pow(2).sum(1).mean()
        for name, value in moved.items():
            loss = loss + FAITHFUL.correction_weight * (value - inputs[name]).pow(2).sum(1).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        plateau.step(loss.item())


class Bench:
    """Units of ResNet-20 behind the nearest-rounded network, at faithful settings."""

    def __init__(self, options: Reconstruction) -> None:
        program, tuning, _ = prepared("ladder", "W4A4")
        images = tuning.slice(0, IMAGES)
        task = RoundingTask(program, images, None)
        self.engine = Reconstructor(task, options, "cost")
        names = [node.name for node in self.engine.module.graph.nodes if node.op == "placeholder"]
        self._images = dict(zip(names, images.inputs, strict=True))

    def ours(self, index: int) -> tuple[Tuner, Cut]:
        """Return the engine's side of one unit, and the cut around it."""
        engine = self.engine
        quantized, floats = Source(self._images, torch.float32), Source(self._images, torch.float32)
        for earlier in range(index):
            cut = engine.cut(earlier)
            needed = {name for unit in engine.units[earlier + 1 :] for name in unit.inputs}
            quantized.advance(engine.nearest(cut, Outcome()), needed)
            floats.advance(cut.floats, needed)
        cut = engine.cut(index)
        return engine.tuner(cut, Outcome(), quantized, floats), cut

    def at(self, index: int) -> tuple[Tuner, Plain]:
        """Return both sides of one unit, from the same start."""
        engine, (tuner, cut) = self.engine, self.ours(index)
        return tuner, Plain(tuner, lambda made: cut.quantized(engine.quantizers.in_place(made, Outcome())))

    def batches(self, index: int) -> Callable[[], Tensor]:
        """Return what draws the batches that the engine draws for a unit."""
        generator = torch.Generator().manual_seed(self.engine.seed(index))
        return lambda: torch.randint(IMAGES, (self.engine.options.batch,), generator=generator)


def disagreement(index: int, iterations: int) -> float:
    """Return the largest relative difference between the losses of both sides at the plain side's parameters.

    Left to themselves the two part after a few steps: Adam's first ones go by the sign of the gradient, and round-off
    decides the sign where the gradient is next to nothing.
    """
    quiet = replace(FAITHFUL, correction=0, inputs="quantized", drop=0.0, iterations=iterations)
    bench = Bench(quiet)
    (tuner, plain), draw = bench.at(index), bench.batches(index)
    largest = 0.0
    for k in range(iterations):
        images = draw()
        plain.hand_over(tuner)
        ours = float(tuner.total(tuner.errors(images, k)).detach())
        theirs = plain.step(images, k)
        largest = max(largest, abs(theirs - ours) / abs(theirs))
    return largest


def iteration_seconds(index: int) -> tuple[float, float]:
    """Return the seconds of one iteration, plain and ours, medians of turns taken one after the other."""
    # Past the warm-up from the first iteration on, as four fifths of the iterations are.
    options = replace(FAITHFUL, correction=0, iterations=STEPS, warmup=0.0)
    bench = Bench(options)
    (tuner, plain), draw = bench.at(index), bench.batches(index)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for turn in range(TURNS + 1):
        for side in ("plain", "ours") if turn % 2 else ("ours", "plain"):
            started = time.perf_counter()
            if side == "ours":
                tuner.run()
            else:
                for k in range(STEPS):
                    plain.step(draw(), k)
            if turn:
                seconds[side].append((time.perf_counter() - started) / STEPS)
    return statistics.median(seconds["plain"]), statistics.median(seconds["ours"])


def fast_seconds(index: int) -> float:
    """Return the seconds of one iteration of the profile `fast`, the mean over those with and without prediction."""
    count = 2 * FAST.prediction_every
    tuner, _ = Bench(replace(FAST, iterations=count)).ours(index)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        tuner.run()
        seconds.append((time.perf_counter() - started) / count)
    return statistics.median(seconds)


def correction_seconds(index: int) -> tuple[float, float]:
    """Return the seconds of one step of correcting one image, plain and ours, both in batches of 32."""
    bench = Bench(FAITHFUL)
    engine = bench.engine
    tuner, _ = Bench(replace(FAITHFUL, correction=0)).at(index)
    cut = engine.cut(index)
    known = {name: engine.statistics[name] for name in cut.unit.nodes if name in engine.statistics}
    if not known:
        return 0.0, 0.0
    span = cut_span(engine.module, cut.unit.nodes, known, quantized=False)
    every = tuner.material.floats(torch.arange(IMAGES))
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for turn in range(3):
        started = time.perf_counter()
        for start in range(0, IMAGES, 32):
            piece = {name: value[start : start + 32] for name, value in every.items()}
            plain_correction(span, piece, known, CORRECTIONS)
        between = time.perf_counter()
        corrected_inputs(span, every, known, CORRECTIONS, FAITHFUL.correction_weight, 32)
        if turn:
            seconds["plain"].append(between - started)
            seconds["ours"].append(time.perf_counter() - between)
    count = CORRECTIONS * IMAGES
    return statistics.median(seconds["plain"]) / count, statistics.median(seconds["ours"]) / count


def main() -> None:
    """Measure, print the table, write the JSON."""
    asked(__doc__)
    torch.set_num_threads(1)
    rows: list[dict[str, str | float]] = []
    totals = dict.fromkeys(("plain loop", "our loop", "plain correction", "our correction", "fast"), 0.0)
    for index in UNITS:
        name = Bench(replace(FAITHFUL, correction=0)).engine.units[index].name
        apart = disagreement(index, 25)
        plain, ours = iteration_seconds(index)
        plain_step, our_step = correction_seconds(index)
        fast = fast_seconds(index)
        steps = FULL_IMAGES * FULL_CORRECTION
        amounts = (FULL_ITERATIONS * plain, FULL_ITERATIONS * ours, steps * plain_step, steps * our_step)
        totals["fast"] += FAST.iterations * fast
        for key, more in zip(("plain loop", "our loop", "plain correction", "our correction"), amounts, strict=True):
            totals[key] += more
        row: dict[str, str | float] = {"unit": name, "largest relative difference of losses": apart}
        row |= {"plain ms": 1e3 * plain, "our ms": 1e3 * ours, "times faster": plain / ours, "fast ms": 1e3 * fast}
        row |= {"plain correction us": 1e6 * plain_step, "our correction us": 1e6 * our_step}
        rows.append(row)
        print(row, flush=True)
    overall = {}
    for count in (1, CONFIGURATIONS):
        plain = count * (totals["plain loop"] + totals["plain correction"])
        overall[f"{count} configurations"] = plain / (count * totals["our loop"] + totals["our correction"])
    overall["fast against the plain faithful loop"] = (totals["plain loop"] + totals["plain correction"]) / totals[
        "fast"
    ]
    agreed = max(float(row["largest relative difference of losses"]) for row in rows) < AGREEMENT
    print(overall, "losses agree" if agreed else "losses differ")
    write("reconstruction_cost", rows, {"overall times faster": overall, "losses agree to 1e-3": agreed, "threads": 1})


if __name__ == "__main__":
    main()
