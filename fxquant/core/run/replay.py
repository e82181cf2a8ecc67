"""The loss of any set of substitutions, running only the nodes that they change.

Scoring, reconstruction and verification all need `Phi(S) = E_x loss(f(x), f_S(x))`, where S replaces some nodes of the
graph by other functions of the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.core.errors import CaptureError
from fxquant.core.run.answer_graph import answer_graph
from fxquant.core.run.footprint import Footprint, storages
from fxquant.core.run.runner import Runner, Substitution, dependents

MOST_TOGETHER = 32
"""Images that are run together at most."""
CACHED_BYTES = 1_250_000
"""Bytes of the inputs that are run together: with more, values between layers leave the cache (MobileNetV2, simulated,
one thread: 17 ms an image in twos, 25 in fours, 29 in eights)."""


class Environment(dict[Node, Any]):
    """Values that a replay may read; a missing one is computed again from those that are there.

    Args:
        values: value of each node kept.
        substitution: the substitution of the run that made them.
        kept: the nodes whose values this run and the replays on top of it keep; None for every node.
    """

    def __init__(
        self,
        values: Mapping[Node, Any],
        substitution: Substitution | None = None,
        kept: frozenset[Node] | None = None,
    ) -> None:
        super().__init__(values)
        self.substitution: Substitution = substitution or {}
        self.kept = kept


class GraphReplay(Runner):
    """Runs a graph, and then again only the nodes downstream of a change.

    Args:
        module: the graph; its single output is a tensor, or a structure whose first tensor is the answer.
        node_cost: node name -> cost of running it once; unnamed nodes count as free.
    """

    def __init__(self, module: GraphModule, node_cost: Mapping[str, float] | None = None) -> None:
        super().__init__(module, node_cost)
        # Inputs and weights exist anyway, and the answer is what a run is for.
        self._always = {node for node in self.nodes if node not in self.varying or node.op in ("placeholder", "output")}

    def forward(
        self,
        inputs: tuple[Tensor, ...],
        substitution: Substitution | None = None,
        kept: frozenset[Node] | None = None,
    ) -> tuple[Tensor, Environment]:
        """Run the whole graph and return its answer with its intermediate values.

        Args:
            inputs: one tensor per placeholder.
            substitution: functions that are run in place of nodes.
            kept: the nodes whose values are kept, for example by `Footprint.within`; None for all. Inputs, weights
                and the answer are always kept.
        """
        environment = Environment(self.given(inputs), substitution, kept)
        self.run(self.steps, environment, None, environment.substitution, self._keep(kept))
        return self.answer(environment), environment

    def recorded(self, inputs: tuple[Tensor, ...], substitution: Substitution) -> tuple[Tensor, Environment]:
        """Run the whole graph with gradients recorded, keeping every value: all of them can be differentiated."""
        with torch.enable_grad():
            return self.forward(inputs, substitution)

    def footprint(
        self, inputs: tuple[Tensor, ...], substitution: Substitution | None = None, apart: bool = False
    ) -> Footprint:
        """Run the whole graph keeping nothing, and return the bytes of its values; adds nothing to `spent`.

        Args:
            inputs: one tensor per placeholder.
            substitution: functions that are run in place of nodes.
            apart: convolutions have values of their own, as where a walk may stop behind any of them.
        """
        values: list[tuple[Node, int]] = []
        live = self.given(inputs)
        seen: dict[Node, int] = {}
        alive, before = dict[Node, int](), self.spent

        def weigh(node: Node) -> None:
            fixed = storages({known: value for known, value in live.items() if known in self._always})
            own = {address: size for address, size in storages(live).items() if address not in fixed}
            alive[node] = sum(own.values())
            value = live[node]
            if isinstance(value, Tensor) and node not in self._always:
                address = value.untyped_storage().data_ptr()
                # A freed address may come again: only what is still alive can be viewed.
                if address in own and all(seen.get(other) != address for other in live):
                    values.append((node, own[address]))
                seen[node] = address

        with torch.no_grad():
            alone = self.clips if apart else ()
            self.run(self.steps, live, None, substitution, self._keep(frozenset()), weigh, alone)
        self.spent = before
        return Footprint(tuple(values), max(alive.values(), default=0), alive)

    def replay(
        self,
        base: Environment,
        substitution: Substitution,
        changed: Iterable[str] | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, Environment]:
        """Run only what the substitution changes, the rest read from `base`; the same answer as a whole run.

        Values that `base` did not keep are computed again from those it kept, each once, and dropped after their last
        reader: a replay holds at most what is kept and what a plain run holds at one node.

        Args:
            base: environment of an earlier run.
            substitution: every node that is substituted now.
            changed: names of those that differ from the earlier run; None for all of `substitution`.
            keep: also return an environment complete enough for further replays (shares the unchanged values).
        """
        names = set(substitution if changed is None else changed)
        dirty = {self.by_name[name] for name in names}
        start = min((self.position[node] for node in dirty), default=len(self.nodes))
        run = dependents(self.nodes[start:], dirty)
        # A missing value that is read has only unchanged ancestors, or it would be among those to run.
        wanted = [source for node in run for source in node.all_input_nodes]
        while wanted:
            source = wanted.pop()
            if source not in run and source not in base:
                run.add(source)
                wanted.extend(source.all_input_nodes)
        now = {name: function for name, function in base.substitution.items() if name not in names}
        now |= {name: function for name, function in substitution.items() if name in names}
        fresh: Environment = Environment({}, now, base.kept)
        order = sorted(run, key=self.position.__getitem__)
        self.run(order, fresh, base, now, self._keep(base.kept if keep else frozenset()))
        complete = Environment({**base, **fresh}, now, base.kept) if keep else fresh
        return self.answer(fresh if self.nodes[-1] in fresh else base), complete

    def answer(self, environment: Mapping[Node, Any]) -> Tensor:
        """Return the first tensor of the graph's output."""
        return first_tensor(environment[self.nodes[-1]])

    def _keep(self, kept: frozenset[Node] | None) -> Callable[[Node], bool] | None:
        return None if kept is None else lambda node: node in kept or node in self._always


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of a model's output, which may be a tuple, list or dict: the answer losses compare.

    Raises:
        CaptureError: it holds none.
    """
    for value in _flatten(output):
        if isinstance(value, Tensor):
            return value
    raise CaptureError(f"the model returns {type(output).__name__} without a tensor; return a tensor, tuple or dict")


def _flatten(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for member in value.values() for leaf in _flatten(member)]
    if isinstance(value, list | tuple):
        return [leaf for member in value for leaf in _flatten(member)]
    return [value]


def model_outputs(
    module: GraphModule, inputs: tuple[Tensor, ...], batch: int | None = None, only: Tensor | None = None
) -> Tensor:
    """Return what losses compare (`answer_graph`) over many images, shape (images, ...), in batches, no gradient.

    Args:
        module: from `capture`, or a simulated graph.
        inputs: images, the first axis of each counts them.
        batch: images that are run together; None takes as many as stay in the cache.
        only: positions of the images to run, int64; None for all.

    Raises:
        CaptureError: the graph returns nothing of that kind.
    """
    count, runner = len(inputs[0] if only is None else only), Runner(answer_graph(module))
    if batch is None:
        image = sum(t[:1].nbytes for t in inputs)
        batch = max(1, min(MOST_TOGETHER, CACHED_BYTES // max(1, image)))
    last, fixed = runner.nodes[-1], dict[Node, Any]()
    parts = []
    with torch.no_grad():
        # Weights are rounded once, not once for each batch.
        runner.run([node for node in runner.steps if node not in runner.varying], fixed)
        order = [node for node in runner.steps if node in runner.varying or node is last]
        for start in range(0, count, batch):
            rows = slice(start, start + batch) if only is None else only[start : start + batch]
            values = runner.given([t[rows] for t in inputs])
            runner.run(order, values, fixed, keep=lambda node: node is last)
            parts.append(first_tensor(values[last]))
    return torch.cat(parts)
