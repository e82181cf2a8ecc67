"""Tune one unit: the loop that all profiles share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxquant.core.run import Span
from fxquant.passes.rounding.learned.options import Reconstruction
from fxquant.passes.rounding.learned.quantizers import (
    LearnedActivation,
    SoftRounding,
    StraightThrough,
    random_mask,
)

MIX = 0.5
"""Probability that an element of a mixed input is the quantized one (QDrop, arXiv 2203.05740)."""
BETA = (20.0, 2.0)
"""Exponent of the regulariser at first and in the end, falling linearly after the warm-up (AdaRound)."""
NORM_BATCHES = 4
"""Batches over which the errors of nearest rounding are averaged."""
DIVERGED = 1e3
"""A unit whose error is this many times that of nearest rounding has diverged."""

Draw = Callable[[Tensor], dict[str, Tensor]]
"""Image indices -> values by name."""


@dataclass(frozen=True)
class Material:
    """The values a unit is tuned on; every function returns those of the images with the given indices.

    Args:
        images: their number.
        quantized: inputs of the unit, and other values that the suffix reads, from the quantized network.
        floats: inputs of the unit from the float network, corrected if the options ask for it.
        targets: outputs of the float unit on those.
        answers: answer and features of the float network on the original images.
    """

    images: int
    quantized: Draw
    floats: Draw
    targets: Draw
    answers: Draw


@dataclass(frozen=True)
class Pieces:
    """The unit that is tuned, and the suffix behind it.

    Args:
        unit: the unit with learned modules in place of its quantizers; it also returns the feature if it computes it.
        nearest: the unit as calibrated, weights rounded to nearest.
        suffix: float network behind the unit; None if there is none, or no loss term needs it.
        answer: name of the network's answer.
        feature: name of the values that the last weighted op reads, None if neither unit nor suffix computes them.
        divergence: (float answer, answer) -> mean difference.
        learned: the modules in place of quantizers.
    """

    unit: Span
    nearest: Span
    suffix: Span | None
    answer: str
    feature: str | None
    divergence: Callable[[Tensor, Tensor], Tensor]
    learned: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def holds_answer(self) -> bool:
        """Whether the unit computes the network's answer."""
        return self.answer in self.unit.outputs


@dataclass(frozen=True)
class Trace:
    """Errors during the tuning, without the regulariser.

    Args:
        first: mean weighted error over the first iterations.
        last: the same over the last.
        diverged: whether it stopped because the error was not finite or grew too large.
        losses: of every iteration.
    """

    first: float
    last: float
    diverged: bool
    losses: tuple[float, ...] = field(repr=False, default=())


def channel_sums(error: Tensor) -> Tensor:
    """Return squares summed over channels, mean over images and positions: shape ().

    Channels are on axis 1 of images and vectors, on the last axis of token sequences.
    """
    channels = error.shape[-1] if error.dim() == 3 else error.shape[1] if error.dim() > 1 else 1
    return error.square().sum() * (channels / error.numel())


class Tuner:
    """Runs the loop.

    Args:
        pieces: the unit and its suffix.
        material: the values it is tuned on.
        options: settings of the loop.
        seed: of the batches.
        generator: draws mixtures, on the device of the values; the learned modules hold it too.
    """

    def __init__(
        self, pieces: Pieces, material: Material, options: Reconstruction, seed: int, generator: torch.Generator
    ) -> None:
        self.pieces, self.material, self.options, self.generator = pieces, material, options, generator
        # Drawn on the CPU, so that a seed picks the same images on every device.
        self._batches = torch.Generator().manual_seed(seed)
        self._queue = torch.empty(0, dtype=torch.int64)
        self._soft = [m for m in pieces.learned.values() if isinstance(m, SoftRounding)]
        self._rates = {"rec": 1.0, "prediction": options.prediction, "feature": options.feature}
        if options.answer_by_prediction and pieces.holds_answer:
            self._rates |= {"rec": 0.0, "prediction": options.prediction or 1.0}
        self._wants_answers = bool(self._rates["prediction"] or self._rates["feature"])
        # Without a reconstruction term a step without the prediction would learn nothing.
        self._every = options.prediction_every if self._rates["rec"] else 1
        self._norms = self._at_nearest() if options.normalise else dict.fromkeys(self._rates, 1.0)

    def run(self, track: Callable[[range], Iterable[int]] = lambda steps: steps) -> Trace:
        """Tune, and return the course of the errors.

        Args:
            track: yields the iterations, showing progress.
        """
        options = self.options
        optimizer, schedule = self._optimizers()
        losses: list[float] = []
        for module in self.pieces.learned.values():
            module.train()
        for iteration in track(range(options.iterations)):
            batch = self._draw()
            errors = self.errors(batch, iteration)
            loss = self.total(errors)
            penalty = self._penalty(iteration)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss if penalty is None else loss + penalty)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            # Only normalised errors have a scale to compare with: 1 at nearest rounding.
            if not math.isfinite(losses[-1]) or (
                options.normalise and losses[-1] > DIVERGED * sum(self._rates.values())
            ):
                return Trace(losses[0], losses[-1], True, tuple(losses))
        for module in self.pieces.learned.values():
            module.eval()
        ends = max(1, len(losses) // 20)
        return Trace(sum(losses[:ends]) / ends, sum(losses[-ends:]) / ends, False, tuple(losses))

    def _draw(self) -> Tensor:
        """Return the images of the next step: all are drawn once, in random order, before any is drawn again."""
        while len(self._queue) < self.options.batch:
            self._queue = torch.cat([self._queue, torch.randperm(self.material.images, generator=self._batches)])
        batch, self._queue = self._queue[: self.options.batch], self._queue[self.options.batch :]
        return batch

    def total(self, errors: Mapping[str, Tensor]) -> Tensor:
        """Return the errors weighted and normalised, without the regulariser."""
        return sum((self._rates[name] / self._norms[name] * error for name, error in errors.items()), torch.zeros(()))

    def errors(self, index: Tensor, iteration: int) -> dict[str, Tensor]:
        """Return the errors of one batch, each a scalar; prediction and feature only every few steps."""
        options, unit = self.options, self.pieces.unit
        turn = self._wants_answers and iteration % self._every == 0
        quantized = self.material.quantized(index) if turn or options.inputs != "float" else {}
        inputs = self._inputs(quantized, index)
        if turn and options.inputs == "quantized":
            outputs = answered = unit(inputs)
        elif turn:
            # One pass for both: mixed inputs for the targets, quantized ones for the answer.
            both = unit({name: torch.cat([inputs[name], quantized[name]]) for name in unit.inputs})
            outputs = {name: value[: len(index)] for name, value in both.items()}
            answered = {name: value[len(index) :] for name, value in both.items()}
        else:
            outputs, answered = unit(inputs), {}
        errors: dict[str, Tensor] = {}
        if self._rates["rec"]:
            targets = self.material.targets(index)
            errors["rec"] = sum((channel_sums(outputs[n] - targets[n]) for n in targets), torch.zeros(()))
        if turn:
            errors |= self._answer_errors({**quantized, **answered}, index)
        return errors

    def _answer_errors(self, values: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        pieces, options = self.pieces, self.options
        if pieces.suffix is not None:
            values = {**values, **pieces.suffix(values)}
        reference = self.material.answers(index)
        errors = {}
        if self._rates["prediction"]:
            errors["prediction"] = pieces.divergence(reference[pieces.answer], values[pieces.answer])
        if options.feature and pieces.feature is not None:
            errors["feature"] = channel_sums(values[pieces.feature] - reference[pieces.feature])
        # The factor keeps the gradient unbiased whatever the period.
        return {name: error * self._every for name, error in errors.items()}

    def _inputs(self, quantized: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        names, options = self.pieces.unit.inputs, self.options
        if options.inputs == "quantized":
            return {name: quantized[name] for name in names}
        floats = self.material.floats(index)
        if options.inputs == "float":
            return {name: floats[name] for name in names}
        # Integers, such as token ids, are the same in both networks.
        return {
            name: torch.lerp(floats[name], value, random_mask(value, MIX, self.generator))
            if value.is_floating_point()
            else value
            for name, value in ((name, quantized[name]) for name in names)
        }

    def _penalty(self, iteration: int) -> Tensor | None:
        """Return the weighted regulariser, None during the warm-up or where nothing is rounded."""
        options = self.options
        passed = iteration / options.iterations
        if not self._soft or passed < options.warmup or not options.regulariser:
            return None
        (high, low), share = BETA, (passed - options.warmup) / max(1e-9, 1 - options.warmup)
        beta = low + (high - low) * (1 - share)
        return options.regulariser * sum((module.penalty(beta) for module in self._soft), torch.zeros(()))

    def _optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        options, groups = self.options, list[dict[str, object]]()
        for module in self.pieces.learned.values():
            if isinstance(module, SoftRounding):
                groups.append({"params": [module.logits], "lr": options.rounding_lr, "falls": False})
                if options.level_lr:
                    grids = [p for p in (module.factor, module.moves) if p is not None]
                    groups.append({"params": grids, "lr": options.level_lr, "falls": True})
            elif isinstance(module, StraightThrough):
                rates = [(module.shift, options.weight_lr), (module.factor, options.step_lr)]
                rates += [] if module.moves is None else [(module.moves, options.weight_lr)]
                groups += [{"params": [p], "lr": rate, "falls": True} for p, rate in rates]
            elif isinstance(module, LearnedActivation) and options.step_lr:
                rate = options.step_lr if options.step_share else options.step_lr / float(module.start)
                groups.append({"params": [module.factor], "lr": rate, "falls": True})
        optimizer = torch.optim.Adam(groups, fused=True)
        total = options.iterations
        curves = [
            (lambda k: 0.5 * (1 + math.cos(math.pi * min(k, total) / total))) if group["falls"] else (lambda _: 1.0)
            for group in groups
        ]
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, curves)

    def _at_nearest(self) -> dict[str, float]:
        """Return each error of the unit rounded to nearest, on the quantized network's inputs."""
        pieces, totals = self.pieces, dict.fromkeys(self._rates, 0.0)
        count = min(NORM_BATCHES, math.ceil(self.material.images / self.options.batch))
        with torch.no_grad():
            for k in range(count):
                index = torch.arange(k * self.options.batch, min((k + 1) * self.options.batch, self.material.images))
                quantized, targets = self.material.quantized(index), self.material.targets(index)
                outputs = pieces.nearest(quantized)
                errors = {"rec": sum((channel_sums(outputs[n] - targets[n]) for n in targets), torch.zeros(()))}
                if self._wants_answers:
                    found = self._answer_errors({**quantized, **outputs}, index)
                    errors |= {n: e / self._every for n, e in found.items()}
                for name, error in errors.items():
                    totals[name] += float(error) / count
        # A unit without error at nearest rounding has nothing to be divided by.
        return {name: value if math.isfinite(value) and value > 0 else 1.0 for name, value in totals.items()}
