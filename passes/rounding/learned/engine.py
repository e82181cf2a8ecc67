"""The reconstruction engine: tune unit after unit, each between the quantized prefix and the float suffix."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from fxquant.core.errors import CalibrationError
from fxquant.core.facts import FakeQuantNodes, NormStatistics, Statistics, UnitRecord, WeightGrids
from fxquant.core.ir import Grid, Program
from fxquant.core.run import CalibrationSet, Span, answer_graph, cut_span, loss_of, varying_nodes
from fxquant.core.storage import Arrays, tensor_digest, text_digest
from fxquant.passes.rounding.acceptance import record_of
from fxquant.passes.rounding.learned.activation_starts import START_IMAGES
from fxquant.passes.rounding.learned.certainty import where_it_pays
from fxquant.passes.rounding.learned.correction import corrected_inputs, has_statistics
from fxquant.passes.rounding.learned.cut import Cut, answer_of, feature_of
from fxquant.passes.rounding.learned.options import Reconstruction
from fxquant.passes.rounding.learned.outcome import Outcome
from fxquant.passes.rounding.learned.schedule import PROBED, affordable
from fxquant.passes.rounding.learned.sources import RUN, Source, kept_bytes, kept_type
from fxquant.passes.rounding.learned.tune import Material, Pieces, Tuner
from fxquant.passes.rounding.learned.unit_keys import unit_keys
from fxquant.passes.rounding.learned.unit_quantizers import Chosen, UnitQuantizers
from fxquant.passes.rounding.learned.unit_verdict import Judged, UnitVerdict
from fxquant.passes.rounding.learned.units import Unit, find_units
from fxquant.passes.rounding.registry import RoundingTask

CORRECTION_BATCH = {"cpu": 32}
"""Device -> images corrected at a time: on a CPU as many as its cache holds, elsewhere all of them."""


def reconstruct(task: RoundingTask, options: Reconstruction, method: str) -> Program:
    """Tune every unit of the task's network and return its program with the rounding found.

    Args:
        task: the plan, the images and where finished units are kept.
        options: how each unit is tuned; the task's overrides replace some of them.
        method: name for the records.

    Raises:
        CalibrationError: fewer images than a batch.
    """
    return Reconstructor(task, options.changed(task.overrides), method).run()


class Reconstructor:
    """One run of the engine.

    Args:
        task: the plan, the images and where finished units are kept.
        options: how each unit is tuned.
        method: name for the records, and of the cells in the store.

    Raises:
        CalibrationError: fewer images than a batch.
    """

    def __init__(self, task: RoundingTask, options: Reconstruction, method: str) -> None:
        self.task, self.options, self.method = task, options, method
        if len(task.images) < options.batch:
            raise CalibrationError(
                f"{method!r} draws {options.batch} images a step and was given {len(task.images)}; "
                f"give at least {options.batch}, or a smaller batch"
            )
        bare = task.bare()
        self.module, nodes = answer_graph(bare.module), bare[FakeQuantNodes]
        self.quantizers = UnitQuantizers(self.module, nodes, task.sites, _earlier(task))
        self.units = find_units(self.module, task.sites, options.unit)
        self.answer = answer_of(self.module)
        self.feature = feature_of(self.module, task.sites) if options.feature else None
        self.device = task.images.inputs[0].device
        self.notes: list[str] = []
        loss = loss_of(task.loss)
        options, note = where_it_pays(options, task.overrides, loss, self._answers[self.answer])
        self.options = options
        self.notes += [note] if note else []
        copies = 2 + (options.correction > 0)
        needed = kept_bytes(self.module, self.units, len(task.images), copies)
        self.keep = kept_type(needed, options.memory_mb * 10**6)
        names = {
            torch.float32: "kept in float32",
            torch.bfloat16: "kept in bfloat16",
            None: "computed again when needed",
        }
        task.reporter.say(
            f"{method}: {len(self.units)} units, {needed / 1e6:.0f} MB of values in float32, {names[self.keep]}"
        )
        self.statistics: dict[str, Statistics] = {}
        self.correct = self._may_correct()

    def _may_correct(self) -> bool:
        options, known = self.options, self.task.program.facts.get(NormStatistics)
        if not options.correction:
            return False
        self.statistics = {} if known is None else self._usable(known)
        if not self.statistics:
            self.notes.append(
                "distribution correction was left out: it needs batch normalisation behind convolutions, and the "
                "network has none whose channels are unscaled"
            )
            return False
        if self.keep is None:
            self.notes.append("distribution correction was left out: its inputs do not fit into memory_mb; raise it")
            return False
        return True

    def _usable(self, known: NormStatistics) -> dict[str, Statistics]:
        """Return the statistics of values with a deviation, but for channels that were scaled since."""
        scaled = self.task.rounding.parameters
        nodes = [node for node in self.module.graph.nodes if node.name in known.folded and has_statistics(node)]
        own = {node.name: [str(source.target) for source in _constants(node)] for node in nodes}
        return {name: known.folded[name] for name, paths in own.items() if not scaled.keys() & set(paths)}

    def run(self) -> Program:
        """Tune unit after unit."""
        images, held_out = self.task.images, self.task.held_out
        chosen = self._chosen()
        quantized, floats = Source(self._named(images), self.keep), Source(self._named(images), self.keep)
        held = None if held_out is None or not self.options.guard else self._verdict(held_out)
        keys = self._keys([f"{self.options} {index in chosen}" for index in range(len(self.units))])
        decided, records = Outcome(), list[UnitRecord]()
        for index, unit in enumerate(self.units):
            cut, key = self.cut(index), keys[index]
            cell = self.task.store.get(key)
            if cell is None:
                outcome, record = self._tuned(cut, decided, quantized, floats, held, index in chosen)
                # What follows reads the stored arrays, computed or found, so that both give the same result.
                cell = self.task.store.put(key, {**outcome.arrays(), **_to_arrays(record)})
            records.append(_from_arrays(unit, self.method, cell))
            decided = decided.joined(Outcome.from_arrays(cell, self.device))
            # Later units read this one as decided, learned or not.
            final = cut.quantized(self.quantizers.in_place({}, decided))
            needed = {name for later in self.units[index + 1 :] for name in later.inputs}
            quantized.advance(final, needed)
            floats.advance(cut.floats, needed)
            if held is not None:
                held.advance(cut, final, needed)
        return self._done(decided, tuple(records))

    def _chosen(self) -> frozenset[int]:
        """Return the positions of the units that are tuned; where `seconds` are too few for all, with a note."""
        seconds, store = self.options.seconds, self.task.store
        if not seconds:
            return frozenset(range(len(self.units)))
        # What units lose and cost depends on all of the plan, which the last key tells.
        last = self._keys([str(self.options)] * len(self.units))[-1]
        key = f"{self.method}-schedule-{last.rpartition('-')[2]}"
        # Kept, for times differ from run to run, and a resumed run must tune the same units.
        cell = store.get(key)
        cell = store.put(key, self._priced()) if cell is None else cell
        chosen = affordable(cell["losses"].tolist(), cell["costs"].tolist(), seconds)
        if left := [unit.name for index, unit in enumerate(self.units) if index not in chosen]:
            needed = float(cell["costs"].sum())
            self.notes.append(
                f"seconds={seconds:g} went to the {len(chosen)} units that lose most; {', '.join(left)} stayed as they "
                f"were, all would take {needed:.0f} s"
            )
        return chosen

    def _keys(self, settings: list[str]) -> list[str]:
        chosen = self.quantizers.chosen
        starts = (chosen.weights, chosen.biases)
        return unit_keys(self.method, self.module, self.units, self.task.choices, starts, settings)

    def _priced(self) -> Arrays:
        """Return the loss of the network quantized up to each unit without tuning, and the seconds to tune each."""
        images, options = self.task.images, replace(self.options, iterations=PROBED)
        quantized, floats = Source(self._named(images), self.keep), Source(self._named(images), self.keep)
        verdict, decided = self._verdict(self.task.held_out or images), Outcome()
        losses, costs = list[float](), list[float]()
        for index, unit in enumerate(self.units):
            cut, seconds = self.cut(index), 0.0
            if self.quantizers.has_open(unit, decided, options):
                tuner = self.tuner(cut, decided, quantized, floats, options)
                started = time.perf_counter()
                _ = tuner.run()
                seconds = (time.perf_counter() - started) / PROBED
            decided = decided.joined(self.quantizers.as_calibrated(unit, decided))
            final = cut.quantized(self.quantizers.in_place({}, decided))
            loss = verdict.judged(cut, final).loss
            # What the answer does not depend on adds nothing.
            losses.append(loss if loss is not None else losses[-1] if losses else 0.0)
            costs.append(seconds * self.options.iterations)
            needed = {name for later in self.units[index + 1 :] for name in later.inputs}
            quantized.advance(final, needed)
            floats.advance(cut.floats, needed)
            verdict.advance(cut, final, needed)
        return {"losses": np.array(losses), "costs": np.array(costs)}

    def _verdict(self, images: CalibrationSet) -> UnitVerdict:
        one, other = (Source(self._named(images), self.keep) for _ in range(2))
        answers = self._float_answers(images)[self.answer]
        return UnitVerdict(one, other, images, loss_of(self.task.loss), self.answer, answers)

    def cut(self, index: int) -> Cut:
        """Return the graph cut around the unit at this position."""
        wanted = tuple(name for name in (self.answer, self.feature) if name is not None)
        return Cut(self.module, self.units, index, wanted)

    def seed(self, index: int) -> int:
        """Return the seed of a unit; independent of earlier units, so that a resumed run gives the same result."""
        return int(text_digest(f"{self.task.seed} {self.method} {index}"), 16) % 2**62

    def tuner(
        self, cut: Cut, decided: Outcome, quantized: Source, floats: Source, asked: Reconstruction | None = None
    ) -> Tuner:
        """Return the loop that tunes a unit.

        Args:
            cut: around the unit.
            decided: of earlier units.
            quantized: values that cross the cut before the unit, of the quantized network.
            floats: values that cross it in the float network.
            asked: settings in place of the engine's.
        """
        # Where the answer does not depend on the unit, only its own outputs can be compared.
        options = asked or self.options
        options = options if cut.computes(self.answer) else replace(options, prediction=0.0, feature=0.0)
        generator = torch.Generator(self.device).manual_seed(self.seed(cut.index))
        starts: dict[str, Grid] = {}
        if options.activation_start == "quantized":
            some = torch.arange(min(START_IMAGES, len(quantized)))
            starts = self.quantizers.starts(cut.unit, decided, lambda names: quantized.take(names, some))
        learned = self.quantizers.learned(cut.unit, decided, options, generator, starts)
        pieces = Pieces(
            cut.quantized(self.quantizers.in_place(learned, decided)),
            self.nearest(cut, decided),
            cut.suffix if options.wants_answers else None,
            self.answer,
            self.feature if cut.computes(self.feature) else None,
            partial(loss_of(self.task.loss).soften, temperature=options.temperature),
            learned,
        )
        material = self._material(cut, quantized, floats, options)
        return Tuner(pieces, material, options, self.seed(cut.index), generator)

    def nearest(self, cut: Cut, decided: Outcome) -> Span:
        """Return a unit as calibrated, without tuning."""
        calibrated = self.quantizers.as_calibrated(cut.unit, decided)
        return cut.quantized(self.quantizers.in_place({}, decided.joined(calibrated)))

    def _tuned(
        self,
        cut: Cut,
        decided: Outcome,
        quantized: Source,
        floats: Source,
        held: UnitVerdict | None,
        chosen: bool,
    ) -> tuple[Outcome, UnitRecord]:
        """Tune one unit if it is chosen, and return its outcome, that of calibration where tuning is rejected."""
        started = time.perf_counter()
        before = after = Judged() if held is None else held.judged(cut, self.nearest(cut, decided))
        outcome, reason = Outcome(), f"not tuned: seconds={self.options.seconds:g} went to units that lose more"
        if chosen:
            outcome, reason = self._learned(cut, decided, quantized, floats)
        if not reason and held is not None:
            after = held.judged(cut, cut.quantized(self.quantizers.in_place({}, decided.joined(outcome))))
            reason = after.rejection(before, self.task.loss)
        if reason:
            outcome = self.quantizers.as_calibrated(cut.unit, decided)
        seconds = time.perf_counter() - started
        unit = cut.unit
        return outcome, record_of(unit.name, self.method, before.loss, after.loss, reason, seconds, unit.sites)

    def _learned(self, cut: Cut, decided: Outcome, quantized: Source, floats: Source) -> tuple[Outcome, str]:
        """Return the outcome of the loop, and why it cannot be used, "" if it can."""
        if not self.quantizers.has_open(cut.unit, decided, self.options):
            return Outcome(), "earlier units decided its weights and steps"
        tuner = self.tuner(cut, decided, quantized, floats)
        title = f"{self.method} {cut.index + 1}/{len(self.units)} {cut.unit.name}"
        trace = tuner.run(partial(self.task.reporter.track, title=title, total=self.options.iterations))
        outcome = self.quantizers.decided(cut.unit, tuner.pieces.learned)
        if trace.diverged or not outcome.finite:
            return outcome, f"diverged: error {trace.first:.3g} at first, {trace.last:.3g} at last"
        return outcome, ""

    def _material(self, cut: Cut, quantized: Source, floats: Source, options: Reconstruction) -> Material:
        unit, suffix = cut.unit, cut.suffix if options.wants_answers else None
        # The suffix also reads values that bypass the unit, such as those of a long skip.
        reads = {*unit.inputs, *(suffix.inputs if suffix is not None else ())} - set(unit.outputs)
        fixed = self._tuning_inputs(cut, floats)
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

    def _tuning_inputs(self, cut: Cut, floats: Source) -> dict[str, Tensor] | None:
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
            batch = CORRECTION_BATCH.get(self.device.type, len(floats))
            total = -(-len(floats) // batch)
            track = partial(task.reporter.track, title=f"correct inputs of {cut.unit.name}", total=total)
            found = corrected_inputs(
                span, every, statistics, options.correction, options.correction_weight, batch, track
            )
            # Other inputs of the unit are not corrected.
            cell = task.corrections.put(key, {name: value.cpu().numpy() for name, value in {**every, **found}.items()})
        return {name: torch.from_numpy(cell[name]).to(self.device) for name in cut.unit.inputs}

    @cached_property
    def _answers(self) -> dict[str, Tensor]:
        return self._float_answers(self.task.images)

    def _float_answers(self, images: CalibrationSet) -> dict[str, Tensor]:
        nodes = [node.name for node in varying_nodes(self.module.graph)]
        outputs = dict.fromkeys((self.answer, *([self.feature] if self.feature in nodes else [])))
        return cut_span(self.module, nodes, outputs, quantized=False).run(self._named(images), RUN)

    def _named(self, images: CalibrationSet) -> dict[str, Tensor]:
        names = [node.name for node in self.module.graph.nodes if node.op == "placeholder"]
        return dict(zip(names, images.inputs, strict=False))

    def _done(self, decided: Outcome, records: tuple[UnitRecord, ...]) -> Program:
        known = self.task.rounding
        grids = {site: known.grid_of(site, self.task.program[WeightGrids]) for site in decided.scales}
        learned = {
            site: replace(grid, scale=decided.scales[site], levels=decided.levels.get(site, grid.levels))
            for site, grid in grids.items()
        }
        rounding = replace(
            known,
            weights=decided.weights,
            grids={**known.grids, **learned},
            biases=decided.biases,
            activations={g: self.quantizers.with_step(g, decided) for g in decided.steps},
            units=(*known.units, *records),
            notes=(*known.notes, *self.notes),
        )
        return self.task.done(rounding, self.method)


def _earlier(task: RoundingTask) -> Chosen:
    """Return what replaces nearest rounding and the model's biases in the task's program."""
    rounding, grids = task.rounding, task.program[WeightGrids]
    weights = {site.name: rounding.weight_of(site.name, grids) for site in task.sites}
    return Chosen({name: weight for name, weight in weights.items() if weight is not None}, rounding.biases)


def _constants(node: Node) -> list[Node]:
    """Return the constants that an op reads, directly or through quantizers."""
    sources = [s.all_input_nodes[0] if s.op == "call_module" else s for s in node.all_input_nodes]
    return [source for source in sources if source.op == "get_attr"]


def _to_arrays(record: UnitRecord) -> Arrays:
    numbers = [record.before, record.after, float(record.kept), record.seconds]
    return {"record": np.array(numbers), "reason": np.array(record.reason)}


def _from_arrays(unit: Unit, method: str, cell: Arrays) -> UnitRecord:
    before, after, kept, seconds = (float(value) for value in cell["record"])
    return UnitRecord(unit.name, method, before, after, bool(kept), str(cell["reason"]), seconds, unit.sites)
