"""The scorer: what every estimator measures with, on one batch of images after the other.

A candidate (site, choice) is a substitution in the otherwise float network: the site's weight is rounded to its grid,
and the activation it reads to its own (CLADO's perturbation). Only nodes downstream are run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fxquant.core.data import CalibrationSet
from fxquant.core.edges import EdgeGroups
from fxquant.core.fake_quant import FakeQuantize
from fxquant.core.graphs import resolve, tensor_at
from fxquant.core.grids import FakeQuantNodes, WeightGrids
from fxquant.core.losses import LOSSES
from fxquant.core.ops import rule_of, shape_of
from fxquant.core.oracle import Environment, GraphReplay, environment_bytes
from fxquant.core.program import Program
from fxquant.core.progress import SILENT, Reporter
from fxquant.core.ranges import Ranges
from fxquant.core.score_store import ScoreStore
from fxquant.core.spec import Candidate, Sites, activation_spec

ENVIRONMENT_LIMIT = 384 * 10**6
"""Bytes of intermediate values kept for one batch; a pair sweep keeps two such sets."""

LARGEST_BATCH = 64

Replacement = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """One batch of images and its number, which names its cells in the store."""

    index: int
    images: CalibrationSet


def _identity(x: Tensor) -> Tensor:
    return x


class Scorer:
    """Measures losses of candidates on calibration images.

    Args:
        program: simulated graph (any plan) with Sites, EdgeGroups, Ranges, WeightGrids and FakeQuantNodes.
        images: the images to score on.
        loss: name of the loss.
        store: finished cells of an earlier run.
        reporter: shows progress.
    """

    def __init__(
        self, program: Program, images: CalibrationSet, loss: str, store: ScoreStore, reporter: Reporter = SILENT
    ) -> None:
        self.program = program
        self.images = images
        self.loss = loss
        self.store = store
        self.reporter = reporter
        costs = {node.name: _node_cost(node) for node in program.module.graph.nodes}
        self.network_cost = sum(costs.values())
        self.replay = GraphReplay(program.module, costs)
        self._nodes = program[FakeQuantNodes]
        every = (*self._nodes.weights.values(), *self._nodes.activations.values())
        self.off: dict[str, Replacement] = {name: _identity for names in every for name in names}
        # In graph order, so that a pair's second site lies downstream of the first and little is run again.
        position = {name: index for index, name in enumerate(self.replay.by_name)}
        sites = sorted(program[Sites].sites, key=lambda s: position[s.nodes[0]])
        order = {site.name: index for index, site in enumerate(sites)}
        self.candidates: tuple[Candidate, ...] = program[Sites].candidates
        self.by_depth: list[int] = sorted(range(len(self.candidates)), key=lambda k: order[self.candidates[k].site])
        self._substitutions = [self._substitute(candidate) for candidate in self.candidates]
        self._base: tuple[int, Tensor, Environment] | None = None
        self.batch = self._batch_size()

    def _substitute(self, candidate: Candidate) -> dict[str, Replacement]:
        if candidate.choice.is_float:
            return {}
        site = self.program[Sites].by_name(candidate.site)
        grid = self.program[WeightGrids].at(site.name, candidate.choice.weight_bits)
        rounded = FakeQuantize(grid.spec, grid.scale, grid.zero_point)(
            tensor_at(self.program.module, site.weight).detach()
        )
        made: dict[str, Replacement] = {name: _constant(rounded) for name in self._nodes.weights[site.name]}
        groups, spec = self.program[EdgeGroups], activation_spec(candidate.choice.activation_bits)
        for name in self._nodes.inputs[site.name]:
            source = resolve(self.program.module.graph, name).all_input_nodes[0]
            group = groups.group_of(source.name)
            assert group is not None
            made[name] = FakeQuantize(spec, *self.program[Ranges].parameters(groups.producers[group], spec))
        return made

    def _batch_size(self) -> int:
        _, environment = self.base(Part(-1, self.images.slice(0, 1)))
        # Weights are held once, whatever the batch.
        constants = {node: value for node, value in environment.items() if node.op == "get_attr"}
        one = max(1, environment_bytes(environment) - environment_bytes(constants))
        self._base, self.replay.spent = None, 0.0
        return max(1, min(LARGEST_BATCH, len(self.images), ENVIRONMENT_LIMIT // one))

    @property
    def parts(self) -> list[Part]:
        """The batches, sized so that their intermediate values stay within the memory limit."""
        return [Part(index, images) for index, images in enumerate(self.images.batches(self.batch))]

    def base(self, part: Part) -> tuple[Tensor, Environment]:
        """Return the float network's answer and every intermediate value on a batch; the last batch is kept."""
        if self._base is None or self._base[0] != part.index:
            self._base = None
            with torch.no_grad():
                self._base = (part.index, *self.replay.forward(part.images.inputs, self.off))
        return self._base[1:]

    def run(
        self, base: Environment, column: int, on_top_of: int | None = None, keep: bool = False
    ) -> tuple[Tensor, Environment]:
        """Replay one candidate, alone or on top of the run of another.

        Args:
            base: environment of the float run, or of `on_top_of`'s run with keep=True.
            column: index of the candidate.
            on_top_of: index of the candidate that `base` already holds.
            keep: return an environment for further replays.
        """
        own = self._substitutions[column]
        below = {} if on_top_of is None else self._substitutions[on_top_of]
        with torch.no_grad():
            return self.replay.replay(base, {**self.off, **below, **own}, changed=own, keep=keep)

    def losses(self, reference: Tensor, answer: Tensor, images: CalibrationSet) -> Tensor:
        """Return the loss per image, float64 of shape (images,)."""
        return LOSSES[self.loss](reference, answer, images.labels)

    def take_spent(self, images: int) -> float:
        """Return what was run since the last call, in whole-network passes over one image, and start again."""
        spent, self.replay.spent = self.replay.spent, 0.0
        return spent / self.network_cost * images

    def track(self, parts: list[Part], title: str) -> Iterator[Part]:
        """Yield the batches under a progress bar."""
        yield from self.reporter.track(parts, title, len(parts))


def _constant(value: Tensor) -> Replacement:
    def replaced(_: Tensor) -> Tensor:
        return value

    return replaced


def _node_cost(node: torch.fx.Node) -> float:
    """Return multiply-accumulates of a node plus one per output element, for the images it was traced with."""
    if node.op not in ("call_function", "call_method"):
        return 0.0
    rule, shape = rule_of(node), shape_of(node)
    work = (rule.macs(node) if rule is not None and rule.macs is not None else 0) + prod(shape)
    return float(work)
