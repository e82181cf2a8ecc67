"""The reconstruction engine: unit after unit, each tuned behind the quantized and in front of the float network."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.core.batchnorm import NormStatistics, Statistics
from fxquant.core.data import CalibrationSet
from fxquant.core.errors import CalibrationError
from fxquant.core.grids import FakeQuantNodes, WeightGrid, WeightGrids
from fxquant.core.losses import LOSSES
from fxquant.core.program import Program
from fxquant.core.rounding import UnitRecord
from fxquant.core.score_store import Arrays
from fxquant.core.spans import Span, cut_span, is_tensor, varying_nodes
from fxquant.core.store import tensor_digest, text_digest
from fxquant.passes.rounding.asymmetric import with_asymmetric_weights
from fxquant.passes.rounding.correction import corrected, has_statistics
from fxquant.passes.rounding.options import Reconstruction
from fxquant.passes.rounding.outcome import Outcome, Quantizers
from fxquant.passes.rounding.registry import RoundingTask
from fxquant.passes.rounding.sources import RUN, Source, kept_bytes, kept_type
from fxquant.passes.rounding.tune import Material, Pieces, Tuner, relative_error, softened_kl
from fxquant.passes.rounding.units import Unit, find_units

CORRECTION_BATCH = 128
"""Images corrected at a time."""


def reconstruct(task: RoundingTask, options: Reconstruction, method: str) -> Program:
    """Tune every unit of the task's network and return its program with the rounding found.

    Args:
        task: the plan, the images and where finished units are kept.
        options: how; the task's overrides take their place.
        method: name for the records.

    Raises:
        CalibrationError: fewer images than a batch, or distribution correction without batch normalisation.
    """
    return _Reconstruction(task, options.changed(task.overrides), method).run()


class _Reconstruction:
    def __init__(self, task: RoundingTask, options: Reconstruction, method: str) -> None:
        self.task, self.options, self.method = task, options, method
        if len(task.images) < options.batch:
            raise CalibrationError(
                f"{method!r} draws {options.batch} images a step and was given {len(task.images)}; "
                f"give at least {options.batch}, or a smaller batch"
            )
        bare = task.bare()
        self.module, nodes = bare.module, bare[FakeQuantNodes]
        self.grids: dict[str, WeightGrid] = {}
        if options.asymmetric:
            self.module, self.grids = with_asymmetric_weights(bare)
        self.quantizers = Quantizers(self.module, nodes, task.sites, {} if options.asymmetric else _earlier(task))
        self.units = find_units(self.module, task.sites, options.unit)
        self.answer = _answer(self.module)
        self.feature = _feature(self.module, task) if options.feature else None
        self.device = task.images.inputs[0].device
        self.notes: list[str] = []
        copies = 2 + (options.correction > 0)
        needed = kept_bytes(self.module, self.units, len(task.images), copies)
        self.keep = kept_type(needed, options.memory_mb * 10**6)
        names = {torch.float32: "float32", torch.bfloat16: "bfloat16", None: "nowhere, they are run again"}
        task.reporter.say(
            f"{method}: {len(self.units)} units, {needed / 1e6:.0f} MB of values in float32, kept in {names[self.keep]}"
        )
        self.statistics: dict[str, Statistics] = {}
        self.correct = self._may_correct()

    def _may_correct(self) -> bool:
        options, known = self.options, self.task.program.facts.get(NormStatistics)
        if not options.correction:
            return False
        self.statistics = {} if known is None else self._usable(known)
        if not self.statistics:
            why = "distribution correction needs batch normalisation behind convolutions, and the network has none left"
            if options.needs_correction:
                raise CalibrationError(f"{why}; use correction=0 or a profile without it")
            self.notes.append(f"{why}: left out")
            return False
        if self.keep is None:
            self.notes.append("distribution correction left out: its inputs do not fit into memory_mb")
            return False
        return True

    def _usable(self, known: NormStatistics) -> dict[str, Statistics]:
        """Return what is known of values with a deviation, and was not made untrue by scaling channels since."""
        scaled = self.task.rounding.parameters
        nodes = [node for node in self.module.graph.nodes if node.name in known.folded and has_statistics(node)]
        own = {node.name: [str(source.target) for source in _constants(node)] for node in nodes}
        return {name: known.folded[name] for name, paths in own.items() if not scaled.keys() & set(paths)}

    def run(self) -> Program:
        """Tune unit after unit."""
        images, held_out = self.task.images, self.task.held_out
        quantized, floats = Source(self._named(images), self.keep), Source(self._named(images), self.keep)
        held = None if held_out is None or not self.options.guard else Source(self._named(held_out), self.keep)
        decided, records = Outcome(), list[UnitRecord]()
        for index, unit in enumerate(self.units):
            cut = _Cut(self, unit, index)
            key = f"{self.method}-{index:03d}"
            cell = self.task.store.get(key)
            if cell is None:
                outcome, record = self._tuned(cut, decided, quantized, floats, held)
                cell = self.task.store.put(key, {**outcome.arrays(), **_to_arrays(record)})
            records.append(_from_arrays(unit, self.method, cell))
            decided = decided.joined(Outcome.from_arrays(cell, self.device))
            final = cut.quantized(self.quantizers.in_place({}, decided))
            needed = {name for later in self.units[index + 1 :] for name in later.inputs}
            quantized.advance(final, needed)
            floats.advance(cut.floats, needed)
            if held is not None:
                held.advance(final, needed)
        return self._done(decided, tuple(records))

    def _tuned(
        self, cut: _Cut, decided: Outcome, quantized: Source, floats: Source, held: Source | None
    ) -> tuple[Outcome, UnitRecord]:
        """Tune one unit, and take what came of it only if it helps."""
        started = time.perf_counter()
        # Each unit draws numbers of its own, so that a resumed run is the same as one in a piece.
        seed = int(text_digest(f"{self.task.seed} {self.method} {cut.index}"), 16) % 2**62
        generator = torch.Generator(self.device).manual_seed(seed)
        calibrated = self.quantizers.as_calibrated(cut.unit, decided)
        learned = self.quantizers.learned(cut.unit, decided, self.options, generator)
        nearest = cut.quantized(self.quantizers.in_place({}, decided.joined(calibrated)))
        before = self._held_out_loss(cut, nearest, held)
        # What the answer does not depend on is tuned for its own outputs' sake.
        options = self.options if cut.computes(self.answer) else replace(self.options, prediction=0.0, feature=0.0)
        if not any(parameter.requires_grad for module in learned.values() for parameter in module.parameters()):
            reason, seconds = "earlier units decided its weights and steps", time.perf_counter() - started
            return calibrated, UnitRecord(
                cut.unit.name, self.method, before, before, False, reason, seconds, cut.unit.sites
            )
        pieces = Pieces(
            cut.quantized(self.quantizers.in_place(learned, decided)),
            nearest,
            cut.suffix if options.wants_answers else None,
            self.answer,
            self.feature if cut.computes(self.feature) else None,
            softened_kl(self.options.temperature) if self.task.loss != "mse" else relative_error,
            learned,
        )
        title = f"{self.method} {cut.index + 1}/{len(self.units)} {cut.unit.name}"
        track = partial(self.task.reporter.track, title=title, total=self.options.iterations)
        trace = Tuner(pieces, self._material(cut, quantized, floats, options), options, seed, generator).run(track)
        outcome = self.quantizers.decided(cut.unit, learned)
        after, reason = before, ""
        if trace.diverged or not outcome.finite:
            reason = f"diverged: error {trace.first:.3g} at first, {trace.last:.3g} at last"
        elif not math.isnan(before):
            after = self._held_out_loss(cut, cut.quantized(self.quantizers.in_place({}, decided.joined(outcome))), held)
            if not after < before:
                reason = f"held-out loss {before:.4g} became {after:.4g}"
        seconds = time.perf_counter() - started
        record = UnitRecord(cut.unit.name, self.method, before, after, not reason, reason, seconds, cut.unit.sites)
        return calibrated if reason else outcome, record

    def _held_out_loss(self, cut: _Cut, span: Span, held: Source | None) -> float:
        """Return the loss of the network quantized up to this unit, NaN without images or an answer to tell."""
        if held is None or not cut.computes(self.answer):
            return math.nan
        names = {*span.inputs, *(cut.suffix.inputs if cut.suffix is not None else ())} - set(span.outputs)
        losses = []
        with torch.no_grad():
            for start in range(0, len(held), RUN):
                index = torch.arange(start, min(start + RUN, len(held)))
                values = held.take(names, index)
                values |= span(values)
                answer = {**values, **({} if cut.suffix is None else cut.suffix(values))}[self.answer]
                assert self.task.held_out is not None
                part = self.task.held_out.slice(start, start + RUN)
                losses.append(LOSSES[self.task.loss](self._held_out_answers[start : start + RUN], answer, part.labels))
        return float(torch.cat(losses).mean())

    def _material(self, cut: _Cut, quantized: Source, floats: Source, options: Reconstruction) -> Material:
        unit, suffix = cut.unit, cut.suffix if options.wants_answers else None
        reads = {*unit.inputs, *(suffix.inputs if suffix is not None else ())} - set(unit.outputs)
        fixed = self._corrected(cut, floats)
        source = floats if fixed is None else Source(fixed, self.keep)
        targets = source.outputs(cut.floats)
        answers = self._answers

        def target(index: Tensor) -> dict[str, Tensor]:
            if targets is not None:
                return {name: value[index].float() for name, value in targets.items()}
            with torch.no_grad():
                return cut.floats(source.take(unit.inputs, index))

        return Material(
            len(quantized),
            lambda index: quantized.take(reads, index),
            lambda index: source.take(unit.inputs, index),
            target,
            lambda index: {name: value[index] for name, value in answers.items()},
        )

    def _corrected(self, cut: _Cut, floats: Source) -> dict[str, Tensor] | None:
        """Return the unit's corrected float inputs, None where nothing is corrected."""
        options, task = self.options, self.task
        known = self.statistics if self.correct else {}
        statistics = {name: known[name] for name in cut.unit.nodes if name in known}
        if not statistics:
            return None
        scaled = tensor_digest(task.rounding.parameters)
        key = text_digest(f"{cut.unit.nodes} {options.correction} {options.correction_weight} {scaled}")
        cell = task.corrections.get(key)
        if cell is None:
            span = cut_span(self.module, cut.unit.nodes, statistics, quantized=False)
            every = floats.take(cut.unit.inputs, torch.arange(len(floats)))
            total = -(-len(floats) // CORRECTION_BATCH)
            track = partial(task.reporter.track, title=f"correct inputs of {cut.unit.name}", total=total)
            found = corrected(
                span, every, statistics, options.correction, options.correction_weight, CORRECTION_BATCH, track
            )
            # What the unit reads besides stays as it is.
            cell = task.corrections.put(key, {name: value.cpu().numpy() for name, value in {**every, **found}.items()})
        return {name: torch.from_numpy(cell[name]).to(self.device) for name in cut.unit.inputs}

    @cached_property
    def _answers(self) -> dict[str, Tensor]:
        return self._float_answers(self.task.images)

    @cached_property
    def _held_out_answers(self) -> Tensor:
        assert self.task.held_out is not None
        return self._float_answers(self.task.held_out)[self.answer]

    def _float_answers(self, images: CalibrationSet) -> dict[str, Tensor]:
        nodes = [node.name for node in varying_nodes(self.module.graph)]
        outputs = dict.fromkeys((self.answer, *([self.feature] if self.feature in nodes else [])))
        return cut_span(self.module, nodes, outputs, quantized=False).run(self._named(images), RUN)

    def _named(self, images: CalibrationSet) -> dict[str, Tensor]:
        names = [node.name for node in self.module.graph.nodes if node.op == "placeholder"]
        return dict(zip(names, images.inputs, strict=False))

    def _done(self, decided: Outcome, records: tuple[UnitRecord, ...]) -> Program:
        known = self.task.rounding
        grids = {**known.grids, **self.grids}
        for site, scale in decided.scales.items():
            grid = grids.get(site) or self.task.program[WeightGrids].at(site, self.task.choices[site].weight_bits)
            grids[site] = WeightGrid(grid.spec, scale, grid.zero_point)
        spec_of = self.quantizers.zero_points()
        rounding = replace(
            known,
            weights=decided.weights,
            grids=grids,
            biases={},
            activations={group: (scale, spec_of[group]) for group, scale in decided.steps.items()},
            units=(*known.units, *records),
            notes=(*known.notes, *self.notes),
        )
        return self.task.done(rounding, self.method)


class _Cut:
    """The graph cut around one unit: the unit in float, the unit quantized one way or another, the float suffix."""

    def __init__(self, whole: _Reconstruction, unit: Unit, index: int) -> None:
        self.unit, self.index, self._module = unit, index, whole.module
        self.floats = cut_span(whole.module, unit.nodes, unit.outputs, quantized=False)
        behind = [name for later in whole.units[index + 1 :] for name in later.nodes]
        wanted = [name for name in (whole.answer, whole.feature) if name is not None]
        outputs = dict.fromkeys(name for name in wanted if name in set(behind))
        self._computed = {*behind, *unit.nodes}
        self._returned = tuple(dict.fromkeys((*unit.outputs, *(name for name in wanted if name in unit.nodes))))
        self.suffix: Span | None = None
        if outputs:
            self.suffix = cut_span(whole.module, behind, outputs, quantized=False)
            if whole.options.compile_suffix:
                self.suffix = self.suffix.compiled()

    def quantized(self, places: dict[str, nn.Module]) -> Span:
        """Return the unit with these modules in place of its quantizers."""
        return cut_span(self._module, self.unit.nodes, self._returned, quantized=True, replacements=places)

    def computes(self, name: str | None) -> bool:
        """Whether the unit or what is behind it computes a value."""
        return name in self._computed


def _answer(module: GraphModule) -> str:
    """Return the name of the node whose value losses compare: the first tensor of the output."""
    return next(source.name for source in module.graph.output_node().all_input_nodes if is_tensor(source))


def _feature(module: GraphModule, task: RoundingTask) -> str | None:
    """Return the name of the values that the last weighted op reads, None where it is the only one."""
    if len(task.sites) < 2:
        return None
    source = next(node for node in module.graph.nodes if node.name == task.sites[-1].nodes[-1]).args[0]
    return source.name if isinstance(source, Node) else None


def _earlier(task: RoundingTask) -> dict[str, Tensor]:
    """Return site name -> weight that the task's program has in the place of nearest rounding."""
    rounding, grids, found = task.rounding, task.program[WeightGrids], dict[str, Tensor]()
    for site in task.sites:
        grid = rounding.grids.get(site.name) or grids.at(site.name, task.choices[site.name].weight_bits)
        weight = rounding.weights.get(site.name, grid.rounded)
        if weight is not None:
            found[site.name] = weight
    return found


def _constants(node: Node) -> list[Node]:
    """Return the constants that an op reads, through their quantizers too."""
    sources = [s.all_input_nodes[0] if s.op == "call_module" else s for s in node.all_input_nodes]
    return [source for source in sources if source.op == "get_attr"]


def _to_arrays(record: UnitRecord) -> Arrays:
    told = [record.before, record.after, float(record.kept), record.seconds]
    return {"record": np.array(told), "reason": np.array(record.reason)}


def _from_arrays(unit: Unit, method: str, cell: Arrays) -> UnitRecord:
    before, after, kept, seconds = (float(value) for value in cell["record"])
    return UnitRecord(unit.name, method, before, after, bool(kept), str(cell["reason"]), seconds, unit.sites)
