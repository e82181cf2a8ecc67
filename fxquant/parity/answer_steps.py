"""How far the answers of two computations are apart, in steps; answers that jump are judged by what leads to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxquant.backends.exact import Integers, Trace, run_traced
from fxquant.core.ir import images_axis
from fxquant.core.run import Jump, discrete_answers, returned

STEPS = 1
"""Steps that a layer may differ by when it gets the same integers."""
AGREEMENT = 0.995
"""Share of images on which a runtime and its exact reference must name the same class."""
PLAUSIBLE = 0.9
"""Share that must be equal of an answer that jumps where all that leads to it is, ties left out that were seen."""
SHAKEN = 1e-5
"""What is added to values in front of a jump, relative to the largest: more than float kernels are apart."""
SHAKES = 2
"""Directions in which they are moved to and fro: in one of two, every tie of two values is broken otherwise."""
ROUNDING = 2.0**-18
"""What an output that hardly varies may be off by, relative to its size: a few of float32's own roundings."""
OUTPUT = "output"


@dataclass(frozen=True)
class Kind:
    """What is known of an output before it is computed.

    Args:
        axis: counts images.
        whole: whether it holds integers or truth values.
        scores: whether it is one row of floats for each image.
        jump: what is in front of its jumps, None where it has none.
    """

    axis: int
    whole: bool
    scores: bool
    jump: Jump | None

    def by_image(self, output: Tensor) -> Tensor:
        """Return an output with images along axis 0, one row for each."""
        rows = output.movedim(self.axis, 0) if output.dim() else output.reshape(1)
        return rows.flatten(1) if rows.dim() > 1 else rows


def answer_kinds(graph: Graph) -> tuple[Kind, ...]:
    """Return the kind of every tensor that a graph returns, in order."""
    jumps = discrete_answers(graph)
    nodes = [node for node in returned(graph) if isinstance(node.meta.get("val"), Tensor)]
    kinds = []
    for position, node in enumerate(nodes):
        value = node.meta["val"]
        whole = not value.is_floating_point()
        scores = value.dim() == 2 and not whole and value.shape[1] != 1
        kinds.append(Kind(images_axis(node) or 0, whole, scores, jumps.get(position)))
    return tuple(kinds)


def ties(
    module: GraphModule, kinds: Sequence[Kind], inputs: tuple[Tensor, ...], edges: Integers
) -> list[Tensor | None]:
    """Return where each output changes when what is in front of its jumps moves by rounding errors; None without jumps.

    Args:
        module: simulated graph.
        kinds: of its outputs.
        inputs: images.
        edges: integers to put on its edges.
    """
    fronts = {name for kind in kinds if kind.jump is not None for name in kind.jump.fronts}
    if not fronts:
        return [None] * len(kinds)
    calm, generator = _outputs(run_traced(module, inputs, edges)), torch.Generator().manual_seed(0)
    found: list[Tensor | None] = [None if kind.jump is None else calm[k] != calm[k] for k, kind in enumerate(kinds)]
    for _ in range(SHAKES):
        moves = dict[str, Tensor]()

        def moved(node: Node, value: Tensor, sign: float, moves: dict[str, Tensor] = moves) -> Tensor:
            if node.name not in fronts:
                return value
            if node.name not in moves:
                moves[node.name] = torch.randn(value.shape, generator=generator) * SHAKEN * _size(value)
            return value + sign * moves[node.name]

        for sign in (1.0, -1.0):
            shaken = _outputs(run_traced(module, inputs, edges, (), partial(moved, sign=sign)))
            for k, kind in enumerate(kinds):
                known = found[k]
                if known is not None:
                    differs = shaken[k] != calm[k] if kind.whole else apart(shaken[k], calm[k]) > STEPS
                    found[k] = known | differs
    return found


def _outputs(trace: Trace) -> tuple[Tensor, ...]:
    return trace.output, *trace.others


def _size(value: Tensor) -> float:
    finite = value[value.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


class Answers:
    """The outputs of one computation, batch by batch, and the values that lead to them.

    Args:
        kinds: of the outputs.
    """

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self._kinds = kinds
        self._parts: list[list[Tensor]] = [[] for _ in kinds]
        self._ties: list[list[Tensor]] = [[] for _ in kinds]
        self._leads: dict[str, list[Tensor]] = {}

    def add(self, trace: Trace, tied: Sequence[Tensor | None] = ()) -> None:
        """Append one batch, with what `ties` found for it."""
        for part, kind, output in zip(self._parts, self._kinds, _outputs(trace), strict=True):
            part.append(kind.by_image(output))
        for tie, kind, places in zip(self._ties, self._kinds, tied, strict=False):
            tie.extend([] if places is None else [kind.by_image(places)])
        for name, value in trace.leading.items():
            self._leads.setdefault(name, []).append(value.flatten())

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts[0])

    def jumped(self, expected: Answers) -> bool:
        """Whether the first output jumps, and is not everywhere what is expected."""
        return self._kinds[0].jump is not None and not bool(self._equal(expected, 0).all())

    @property
    def classes(self) -> Tensor | None:
        """The class of each image, None where the first output does not say."""
        kind, found = self._kinds[0], self._joined(0)
        if kind.scores:
            return found.argmax(1)
        return found if kind.whole and found.dim() == 1 else None

    def _joined(self, position: int) -> Tensor:
        return torch.cat(self._parts[position])

    def distance(self, expected: Answers) -> Tensor:
        """Return how far the first output is from what is expected, in steps of 1/255 of the range expected.

        Of one that jumps and is no class scores: how far what leads to it is; where that was not seen, 1 for every
        value that differs.
        """
        kind = self._kinds[0]
        if kind.jump is None or kind.scores:
            return apart(self._joined(0), expected._joined(0))
        found = self._led(expected, kind.jump.leading)
        return torch.cat(list(found.values())) if found else (~self._equal(expected, 0)).float()

    def agreement(self, expected: Answers) -> float | None:
        """Return the share of images with the same class, or of equal values where the first output jumps."""
        mine, other = self.classes, expected.classes
        if mine is not None and other is not None:
            return float((mine == other).double().mean())
        return None if self._kinds[0].jump is None else float(self._equal(expected, 0).double().mean())

    def steps(self, expected: Answers) -> dict[str, float]:
        """Return output, or value that leads to one -> the largest difference in steps, 0 where it is explained.

        What differs in an output that jumps is explained by ties of what leads to it; without them in few values where
        that was compared, and else in as few images as may have another class.
        """
        found = dict[str, float]()
        for position, kind in enumerate(self._kinds):
            name = f"{OUTPUT} {position}" if position else OUTPUT
            equal, mine = self._equal(expected, position), self._joined(position)
            if kind.jump is None:
                found[name] = _largest(apart(mine, expected._joined(position)))
                continue
            led = self._led(expected, kind.jump.leading)
            found |= {f"{lead}, in front of {name}": _largest(each) for lead, each in led.items()}
            if self._ties[position]:
                equal = equal | torch.cat(self._ties[position])
            share = float(equal.double().mean()) if equal.numel() else 1.0
            changed = int((~equal.reshape(len(equal), -1)).any(dim=1).sum())
            seen = len(led) == len(kind.jump.leading)
            explained = share >= PLAUSIBLE if seen else changed <= math.ceil((1 - AGREEMENT) * len(equal))
            # As of values that lie anywhere in their range.
            found[name] = 0.0 if explained else max(255.0 * (1 - share), 2.0 * STEPS)
        return found

    def _equal(self, expected: Answers, position: int) -> Tensor:
        mine, other = self._joined(position), expected._joined(position)
        return mine == other if self._kinds[position].whole else apart(mine, other) <= STEPS

    def _led(self, expected: Answers, names: Sequence[str]) -> dict[str, Tensor]:
        pairs = {name: (self._leads.get(name), expected._leads.get(name)) for name in names}
        known = {
            name: (torch.cat(a), torch.cat(b)) for name, (a, b) in pairs.items() if a is not None and b is not None
        }
        return {name: apart(a, b) for name, (a, b) in known.items() if a.shape == b.shape}


def apart(answer: Tensor, expected: Tensor) -> Tensor:
    """Return how far an output is from what is expected, in steps of 1/255 of the range expected.

    An output that is nearly constant has no range; there a step is what float32 sums are apart by themselves.
    """
    finite = expected[expected.isfinite()]
    if not finite.numel():
        return (answer != expected).float()
    step = (finite.max() - finite.min()) / 255
    steps = (answer - expected).abs() / step.clamp(min=max(float(finite.abs().max()) * ROUNDING, 1e-12))
    # Masked scores are infinite on both sides.
    return torch.where(answer == expected, 0.0, steps)


def _largest(steps: Tensor) -> float:
    return float(steps.max()) if steps.numel() else 0.0
