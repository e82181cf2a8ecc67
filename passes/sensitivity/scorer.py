"""The scorer: measures losses of columns for every estimator, batch by batch.

A column (see `columns`) is a substitution in a network that is otherwise float, or otherwise quantized as a given plan
(the context). Only nodes downstream of the change are run again. Losses are against the float network's answers, minus
the context's own loss: the context has loss 0, and the four-term identity holds around any plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from fxquant.core.facts import BitAllocation, FakeQuantNodes
from fxquant.core.host import ALONE, SILENT, Reporter, Shards
from fxquant.core.ir import Candidate, Program, Sites, rule_of, shape_of
from fxquant.core.run import CalibrationSet, Environment, GraphReplay, Loss, answer_graph, loss_of
from fxquant.core.storage import Arrays, ScoreStore, text_digest
from fxquant.passes.sensitivity.cell_sweep import Cell, Gathered, Memory, Work, sweep
from fxquant.passes.sensitivity.columns import Column, Replacement, Replacements, columns_of

ENVIRONMENT_LIMIT = 10**8
"""Bytes of intermediate values kept for one batch; a pair sweep keeps two such sets. If one image takes more, a part is
kept and the rest recomputed."""

LARGEST_BATCH = 64

BYTES = 4
"""Of one value."""


@dataclass(frozen=True)
class Batch:
    """One batch of images and its number, which names its cells in the store."""

    index: int
    images: CalibrationSet


@dataclass(frozen=True)
class Base:
    """The run that columns are substituted into, on one batch.

    Args:
        reference: answer of the float network.
        answer: answer of the context; the same where the context is the float network.
        environment: the intermediate values of the context's run, as many as fit.
        losses: loss of the context, float64 of shape (images,); zeros for the float network.
    """

    reference: Tensor
    answer: Tensor
    environment: Environment
    losses: Tensor


class Preview(Protocol):
    """Finds out what work will take, instead of doing it."""

    def of(self, name: str, work: Work, images: Sequence[int], scorer: Scorer) -> None:
        """Measure a cell of the work, which runs so many images for each key, and raise to end the estimator."""


def _identity(x: Tensor) -> Tensor:
    return x


class Scorer:
    """Measures losses of columns on calibration images.

    Args:
        program: simulated graph (any plan) with Sites, EdgeGroups, Ranges, WeightGrids and FakeQuantNodes.
        images: the images to score on.
        loss: the loss, by its name where the model has one output.
        store: finished cells of an earlier run.
        reporter: shows progress.
        context: the plan that everything else is quantized by; None leaves everything else in float.
        seed: seed of sampled labels and probes.
        shards: this process among those that share the work.
    """

    def __init__(
        self,
        program: Program,
        images: CalibrationSet,
        loss: str | Loss,
        store: ScoreStore,
        reporter: Reporter = SILENT,
        context: BitAllocation | None = None,
        seed: int = 0,
        shards: Shards = ALONE,
    ) -> None:
        self.program = program
        self.images = images
        self.loss = loss_of(loss)
        self.store = store
        self.reporter = reporter
        self.context = context
        self.seed = seed
        self.shards = shards
        self.costs = {node.name: _node_cost(node) for node in program.module.graph.nodes}
        self.network_cost = sum(self.costs.values())
        self.replay = GraphReplay(answer_graph(program.module), self.costs)
        nodes = program[FakeQuantNodes]
        every = (*nodes.weights.values(), *nodes.activations.values())
        self.off: dict[str, Replacement] = {name: _identity for names in every for name in names}
        replacements = Replacements(program)
        self.candidates: tuple[Candidate, ...] = program[Sites].candidates
        self.columns: tuple[Column, ...]
        self.columns, self.spread = columns_of(program, replacements)
        self._context = {} if context is None else replacements.plan(context)
        # In graph order, so that a pair's second owner lies downstream of the first and little is run again.
        position = {name: index for index, name in enumerate(self.replay.by_name)}
        first: dict[str, int] = {}
        for column in self.columns:
            # A weight's node may come anywhere before the op that reads it.
            read = program[Sites].by_name(column.site).readers if column.site is not None else column.substitution
            places = [position[name] for name in read]
            first[column.owner] = min([first.get(column.owner, len(position)), *places])
        owners = {owner: rank for rank, owner in enumerate(sorted(first, key=lambda owner: first[owner]))}
        self.by_depth: list[int] = sorted(range(len(self.columns)), key=lambda k: owners[self.columns[k].owner])
        #: the replacement of every quantizer in the context
        self.in_context = self._assigned()
        #: where only what the work will take is wanted
        self.preview: Preview | None = None
        self._kept: tuple[int, Base] | None = None
        #: bytes of the values of one image
        self.footprint = self.replay.footprint(images.slice(0, 1).inputs, self.in_context)
        # Values that kernels need not make, between a convolution and the clip behind it, are not asked for.
        asked = frozenset(self.replay.nodes).difference(self.replay.clips) if self.replay.clips else None
        within = self.footprint.within(ENVIRONMENT_LIMIT, self.costs)
        #: nodes whose values of a batch are kept, None for all
        self.parts_kept, self._recomputes = asked if within is None else within, within is not None
        self.batch = max(1, min(LARGEST_BATCH, len(images), ENVIRONMENT_LIMIT // max(1, self.footprint.total)))

    def _assigned(self, *chosen: int) -> dict[str, Replacement]:
        """Return the replacement of every quantizer where these columns replace their owners' part of the context."""
        own = [self.columns[k] for k in chosen]
        replaced = {column.owner for column in own}
        made = dict(self.off)
        for owner, substitution in self._context.items():
            if owner not in replaced:
                made.update(substitution)
        for column in own:
            made.update(column.substitution)
        return made

    @property
    def batches(self) -> list[Batch]:
        """The batches, sized so that their intermediate values stay within the memory limit."""
        return self._cut(self.batch)

    def _cut(self, images: int) -> list[Batch]:
        return [Batch(index, part) for index, part in enumerate(self.images.batches(images))]

    @property
    def answer_bytes(self) -> int:
        """Bytes of the answer to one image."""
        (answer, *_) = self.replay.nodes[-1].all_input_nodes
        return BYTES * prod(shape_of(answer)[1:])

    @property
    def owners(self) -> list[str]:
        """The owner of each column."""
        return [column.owner for column in self.columns]

    @property
    def between(self) -> NDArray[np.bool_]:
        """Shape (columns, columns): whether a plan can have both."""
        names = np.array(self.owners)
        return np.asarray(names[:, None] != names[None, :], dtype=np.bool_)

    def base(self, batch: Batch) -> Base:
        """Return the context's run on a batch with its intermediate values; the last batch is kept."""
        if self._kept is None or self._kept[0] != batch.index:
            self._kept = None
            self._kept = (batch.index, self.base_of(batch.images, self.parts_kept))
        return self._kept[1]

    def base_of(self, images: CalibrationSet, kept: frozenset[Node] | None) -> Base:
        """Return the context's run on images with the values of these nodes; None for all."""
        with torch.no_grad():
            answer, environment = self.replay.forward(images.inputs, self.in_context, kept)
            reference = answer
            if self._context:
                reference, _ = self.replay.forward(images.inputs, self.off, frozenset())
        return Base(reference, answer, environment, self.loss(reference, answer, images.labels))

    def run(
        self, base: Environment, column: int, on_top_of: int | None = None, keep: bool = False
    ) -> tuple[Tensor, Environment]:
        """Replay one column, alone or on top of the run of another.

        Args:
            base: environment of the context's run, or of `on_top_of`'s run with keep=True.
            column: index of the column.
            on_top_of: index of the column that `base` already holds.
            keep: return an environment for further replays.
        """
        below = () if on_top_of is None else (on_top_of,)
        before = self._assigned(*below) if below else self.in_context
        after = self._assigned(*below, column)
        changed = [name for name, replacement in after.items() if replacement is not before[name]]
        with torch.no_grad():
            return self.replay.replay(base, after, changed=changed, keep=keep)

    def losses(self, base: Base, answer: Tensor, images: CalibrationSet) -> Tensor:
        """Return the loss per image above the context's, float64 of shape (images,)."""
        return self.loss(base.reference, answer, images.labels) - base.losses

    def take_spent(self, images: int) -> float:
        """Return what was run since the last call, in whole-network passes over one image, and start again."""
        spent, self.replay.spent = self.replay.spent, 0.0
        return spent / self.network_cost * images

    @property
    def memory(self) -> Memory:
        """Memory that scoring takes, known before it starts."""
        kept = self.parts_kept
        held = sum(size for node, size in self.footprint.values if kept is None or node in kept)
        size = 8 * len(self.columns) ** 2 * len(self.images)
        return Memory(self.batch, self.batch * held, self.batch * self.footprint.working, size, self._recomputes)

    def measure(self, title: str, work: Work) -> dict[str, Arrays]:
        """Return finished cells by key: those of the store as they are, the others measured and kept.

        Args:
            title: shown with the progress.
            work: key -> measures the cell; in an order that uses one batch after the other.

        Raises:
            WorkerError: another process of a sharded run was lost.
        """
        prefix = self.prefix
        named = {f"{prefix}{key}": measured for key, measured in work.items()}
        device = self.images.inputs[0].device
        cells = sweep(title, named, self.store, self.shards, self.reporter, device)
        return {key.removeprefix(prefix): cell for key, cell in cells.items()}

    @property
    def prefix(self) -> str:
        """What names of cells begin with: the store is for one model, data and settings; this is what else counts."""
        around = "" if self.context is None else f"-{text_digest(str(sorted(self._labels(self.context).items())))}"
        return f"batch{self.batch}-seed{self.seed}{around}-"

    def by_batch(
        self, title: str, name: str, cell: Callable[[Scorer, Batch], Cell], images: int | None = None
    ) -> Gathered:
        """Measure one cell for each batch, called `name-0`, `name-1`, ...; `evaluations` are added where it has none.

        Args:
            title: shown with the progress.
            name: of the cells.
            cell: measures one.
            images: of a batch; by default as many as keep intermediate values within the memory limit.

        Raises:
            WorkerError: another process of a sharded run was lost.
        """

        def counted(batch: Batch) -> Cell:
            found = cell(self, batch)
            return {"evaluations": self.take_spent(len(batch.images)), **found}

        batches = self._cut(images or self.batch)
        work = {f"{name}-{batch.index}": partial(counted, batch) for batch in batches}
        if self.preview is not None:
            self.preview.of(name, work, [len(batch.images) for batch in batches], self)
        return Gathered(list(self.measure(title, work).values()))

    @staticmethod
    def _labels(plan: BitAllocation) -> dict[str, str]:
        return {site: choice.label for site, choice in plan.choices.items()}

    @cached_property
    def context_loss(self) -> float:
        """Mean loss of the context over all images, 0 for the float network."""
        if not self._context:
            return 0.0
        losses = self.measure("score the plan", {"context": self._context_cell})["context"]["losses"]
        return float(losses.mean())

    def _context_cell(self) -> Cell:
        losses = torch.cat([self.base(batch).losses for batch in self.batches])
        return {"losses": losses.cpu().numpy(), "evaluations": self.take_spent(len(self.images))}


def standard_error(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard error of the mean over the last axis; NaN for a single sample."""
    if samples.shape[-1] < 2:
        return np.full(samples.shape[:-1], np.nan)
    return np.asarray(samples.std(axis=-1, ddof=1) / np.sqrt(samples.shape[-1]), dtype=np.float64)


def _node_cost(node: Node) -> float:
    """Return multiply-accumulates of a node plus one per output element, for the images it was traced with."""
    if node.op not in ("call_function", "call_method"):
        return 0.0
    rule, shape = rule_of(node), shape_of(node)
    work = (rule.macs(node) if rule is not None and rule.macs is not None else 0) + prod(shape)
    return float(work)
