"""Do the runtimes compute what the plan says? Compared edge by edge, in steps of each edge's own grid.

Two ways of looking. *Forced*: every layer of the reference gets the integers that the runtime had in front of the same
layer, so a difference is that layer's own; one step is allowed, where a value lies on the edge between two integers.
*Free*: both run on their own, and every integer that flips flips others behind it. The exact reference rounds by the
runtime's own formula, so that nothing flips; the simulation rounds in float32, and drifts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.backends import backends, runtimes
from fxquant.backends.exact import BATCH, Integers, Trace, Tracer, edge_labels, exact_graph, run_traced
from fxquant.core.errors import FileFormatError, OptionError, ParityError
from fxquant.core.host import printable
from fxquant.core.run import CalibrationSet, behind_orders, images_for, leading_names
from fxquant.parity.answer_steps import AGREEMENT, OUTPUT, STEPS, Answers, Kind, answer_kinds, ties
from fxquant.report import percent_text, table_text
from fxquant.result import Result

FORMAT_VERSION = 1
SHARE = 0.001
"""Share of an edge's values that may differ, by a step, before two free runs count as diverged there."""
SHOWN = 30
"""Letters of an edge's label that the table shows at most."""


@dataclass(frozen=True)
class Pair:
    """How far a reference and a runtime are apart.

    Args:
        reference: `exact` (the runtime's own rounding) or `simulated` (float32 fake-quant).
        runtime: what it was compared with.
        agreement: share of images with the same top-1 class; of equal values where the output is class numbers or
            jumps otherwise; None where it is neither.
        mean_step: mean difference of the outputs, in steps of 1/255 of their range; of the values that lead to them
            where they jump.
        max_step: the largest.
        layer_step: largest difference of an edge, or of any output, when every layer gets the runtime's integers.
        layer: where that is, None where there is none.
        broken: first edge in graph order that then differs by more than a step; None where the limits are kept.
        first: first edge at which the free runs diverge: by more than a step, or in more than 0.1 % of values.
        edges: edges that were compared.
        within: whether the limits are kept.

    Raises:
        OptionError: a negative difference.
    """

    reference: str
    runtime: str
    agreement: float | None
    mean_step: float
    max_step: float
    layer_step: float
    layer: str | None
    broken: str | None
    first: str | None
    edges: int
    within: bool

    def __post_init__(self) -> None:
        if min(self.mean_step, self.max_step, self.layer_step) < 0 or self.edges < 0:
            raise OptionError(f"a difference is 0 or more, not {self.mean_step}, {self.max_step}, {self.layer_step}")


@dataclass(frozen=True)
class Parity:
    """What `check` found.

    Args:
        images: images compared.
        edges: quantized edges of the plan.
        pairs: reference against runtime.
        accuracy: computation -> top-1 accuracy 0..1; empty without labels.

    Raises:
        OptionError: nothing was compared.
    """

    images: int
    edges: int
    pairs: tuple[Pair, ...]
    accuracy: dict[str, float]

    def __post_init__(self) -> None:
        if not self.pairs or self.images < 1:
            raise OptionError("nothing was compared; give at least one image and one runtime")

    @property
    def within(self) -> bool:
        """Whether every pair keeps the limits."""
        return all(pair.within for pair in self.pairs)

    def require(self) -> None:
        """Do nothing where the limits are kept.

        Raises:
            ParityError: they are not; names the runtime and the first edge that differs.
        """
        wrong = next((pair for pair in self.pairs if not pair.within), None)
        if wrong is None:
            return
        if wrong.broken is not None:
            found = f"{wrong.broken} differs although it gets the same integers; largest difference"
            raise ParityError(
                f"{wrong.runtime} does not compute what the plan says: {found} {wrong.layer_step:.3g} steps, "
                f"{STEPS} is allowed; export again"
            )
        raise ParityError(
            f"{wrong.runtime} names another class than its {wrong.reference} reference on "
            f"{1 - (wrong.agreement or 0):.1%} of {self.images} images, {1 - AGREEMENT:.1%} is allowed; "
            f"they diverge first at {wrong.first or OUTPUT}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        limits = {"layer_step": STEPS, "agreement": AGREEMENT}
        return {"kind": "parity", "version": FORMAT_VERSION, "within": self.within, "limits": limits, **asdict(self)}

    def summary(self) -> str:
        """Return a table for the terminal."""
        rows = [
            (
                pair.reference,
                pair.runtime,
                "-" if pair.agreement is None else percent_text(pair.agreement),
                f"{pair.mean_step:.3g}",
                f"{pair.max_step:.3g}",
                f"{pair.layer_step:.3g}",
                _cut(printable(pair.broken or pair.first or "nowhere")),
                "ok" if pair.within else "WRONG",
            )
            for pair in self.pairs
        ]
        head = ("reference", "runtime", "same", "mean", "max", "layer", "diverges at", "")
        compared = min(pair.edges for pair in self.pairs)
        lines = [
            f"{self.images} images, {compared} of {self.edges} quantized edges seen; differences in steps",
            table_text(head, rows, left=2),
        ]
        if self.accuracy:
            lines.append("top-1: " + ", ".join(f"{k} {percent_text(v)}" for k, v in self.accuracy.items()))
        return "\n".join(lines)


def check(
    result: Result,
    images: object = None,
    against: Sequence[str] | None = None,
    model: Path | Sequence[Path] | None = None,
    threads: int | None = None,
    limit: int | None = None,
) -> Parity:
    """Compare the simulation and the exact reference of a result with the runtimes.

    Args:
        result: whose plan is checked.
        images: iterable of batches, labelled or not; None takes the held-out images that came with the result.
        against: runtimes, of `fxquant.backends.runtimes`; None takes the first of each backend. "compiled" is PyTorch's
            integer graph through torch.compile.
        model: the files to check, each by the runtimes that read files of its suffix; others make a file of their own.
        threads: threads of the runtimes, None for their default.
        limit: images to compare on at most.

    Raises:
        OptionError: an unknown runtime, or no images.
        CalibrationError: the images cannot be used.
        FileFormatError: the file cannot be read.
        LoweringError: the graph cannot be expressed there, or the runtime refuses the model.
        MissingDependencyError: packages of a runtime are not installed.
    """
    given = images if images is not None else result.held_out
    if given is None:
        raise OptionError("the result carries no images; give some to check with")
    if limit is not None and limit < 1:
        raise OptionError(f"a check needs at least one image, not {limit}")
    models = dict[str, bytes]()
    for path in [model] if isinstance(model, Path) else model or ():
        try:
            models[path.suffix] = path.read_bytes()
        except OSError as error:
            raise FileFormatError(f"cannot read {path}: {error.strerror or error}") from error
    return compare(result.simulated, images_for(result.program.module, given, limit), against, models, threads)


def default_runtimes() -> tuple[str, ...]:
    """Return the runtimes that a result is compared with if none are named: the first of each backend."""
    return tuple(next(iter(found.runtimes)) for found in backends().values() if found.runtimes)


def compare(
    simulated: GraphModule,
    images: CalibrationSet,
    against: Sequence[str] | None = None,
    models: Mapping[str, bytes] = MappingProxyType({}),
    threads: int | None = None,
) -> Parity:
    """Compare a simulated graph and its exact references with the runtimes; see `check`.

    Args:
        simulated: the graph.
        images: what to run.
        against: the runtimes.
        models: suffix of a file -> its content.
        threads: threads of the runtimes, None for their default.
    """
    known, against = runtimes(), default_runtimes() if against is None else against
    unknown = [name for name in against if name not in known]
    if unknown or not against:
        raise OptionError(f"unknown runtime {', '.join(unknown) or '(none)'}; known: {', '.join(known)}")
    labels, runs, kinds = edge_labels(simulated), list[_Run](), answer_kinds(simulated.graph)
    # Among equal values each runtime picks in its own order.
    leading, left = leading_names(simulated.graph), behind_orders(simulated.graph)
    answers = {"simulated": Answers(kinds)}
    for name in dict.fromkeys(against):
        found, runtime = known[name], known[name].runtimes[name]
        run = _Run(
            name,
            runtime.trace(simulated, models.get(found.suffix), threads),
            _Comparison(
                "exact", f"exact {name}", name, exact_graph(simulated, runtime.formulas(simulated)), kinds, left
            ),
            _Comparison("simulated", "simulated", name, simulated, kinds, left),
        )
        runs.append(run)
        answers |= {run.exact.answer: Answers(kinds), name: Answers(kinds)}
    for part in images.batches(BATCH):
        rounded = run_traced(simulated, part.inputs, None, leading)
        answers["simulated"].add(rounded)
        for run in runs:
            traced, expected = run.tracer(part.inputs), run_traced(run.exact.graph, part.inputs, None, leading)
            answers[run.name].add(traced)
            answers[run.exact.answer].add(expected)
            tied = ties(simulated, kinds, part.inputs, traced.edges)
            run.exact.add(part.inputs, expected, traced, tied)
            run.simulated.add(part.inputs, rounded, traced, tied)
    pairs = tuple(compared.pair(answers, labels) for run in runs for compared in (run.exact, run.simulated))
    accuracy = {}
    if images.labels is not None:
        named = {name: found.classes for name, found in answers.items()}
        right = {name: classes == images.labels for name, classes in named.items() if classes is not None}
        accuracy = {name: float(hits.double().mean()) for name, hits in right.items()}
    return Parity(len(images), len(labels), pairs, accuracy)


def _cut(label: str) -> str:
    """Return a long label's end, which tells layers apart."""
    return label if len(label) <= SHOWN else f"…{label[1 - SHOWN :]}"


def as_json(parity: Parity) -> str:
    """Return what was found as JSON of ASCII letters."""
    return json.dumps(parity.to_json(), indent=2, ensure_ascii=True)


@dataclass
class _Difference:
    """What one edge has differed by so far."""

    largest: int = 0
    differing: int = 0
    values: int = 0

    def add(self, one: Tensor, other: Tensor) -> None:
        apart = (one.to(torch.int16) - other.to(torch.int16)).abs()
        self.largest = max(self.largest, int(apart.max()) if apart.numel() else 0)
        self.differing += int(apart.count_nonzero())
        self.values += apart.numel()

    @property
    def diverges(self) -> bool:
        return self.largest > STEPS or self.differing > SHARE * self.values


class _Comparison:
    """Collects the differences of one reference and one runtime."""

    def __init__(
        self, kind: str, answer: str, runtime: str, graph: GraphModule, kinds: Sequence[Kind], left: frozenset[str]
    ) -> None:
        self.kind, self.answer, self.runtime, self.graph = kind, answer, runtime, graph
        self.forced, self.free = dict[str, _Difference](), dict[str, _Difference]()
        self.held, self.reached = Answers(kinds), Answers(kinds)
        self._left = left

    def add(self, inputs: tuple[Tensor, ...], free: Trace, runtime: Trace, tied: Sequence[Tensor | None]) -> None:
        held = run_traced(self.graph, inputs, runtime.edges, runtime.leading)
        self.held.add(held)
        self.reached.add(runtime, tied)
        seen = {name: integers for name, integers in runtime.edges.items() if name not in self._left}
        _collect(self.free, free.edges, seen)
        _collect(self.forced, held.edges, seen)

    def pair(self, answers: dict[str, Answers], labels: dict[str, str]) -> Pair:
        expected, answer = answers[self.answer], answers[self.runtime]
        apart, agreement = answer.distance(expected), answer.agreement(expected)
        order = [name for name in labels if name in self.forced]
        steps = dict[str, float]()
        for name in order:
            # A module that is called twice gives two edges one label.
            steps[labels[name]] = max(steps.get(labels[name], 0.0), float(self.forced[name].largest))
        steps |= self.reached.steps(self.held)
        layer = max(steps, key=lambda name: steps[name])
        broken = next((name for name, largest in steps.items() if largest > STEPS), None)
        # An answer that jumped was judged by what leads to it.
        judged = self.kind == "exact" and agreement is not None and not answer.jumped(expected)
        others = round((1 - (agreement or 0.0)) * len(expected)) if judged else 0
        alike = others <= math.ceil((1 - AGREEMENT) * len(expected))
        return Pair(
            reference=self.kind,
            runtime=self.runtime,
            agreement=agreement,
            mean_step=float(apart.mean()),
            max_step=float(apart.max()),
            layer_step=steps[layer],
            layer=layer if steps[layer] > 0 else None,
            broken=broken,
            first=next((labels[name] for name in order if self.free[name].diverges), None),
            edges=len(order),
            within=broken is None and alike,
        )


def _collect(found: dict[str, _Difference], one: Integers, other: Integers) -> None:
    for name, integers in other.items():
        mine = one.get(name)
        if mine is not None and mine.shape == integers.shape:
            found.setdefault(name, _Difference()).add(mine, integers)


@dataclass(frozen=True)
class _Run:
    """One runtime and the references it is compared with."""

    name: str
    tracer: Tracer
    exact: _Comparison
    simulated: _Comparison
