"""A network run up to one node after the other, over all images, so that a decision at one layer reaches the next.

Sequential algorithms (GPTQ, GPFQ, bias correction) decide on a layer from the outputs of the decided layers before it.
One walk through the graph serves all layers: no node runs twice for an image, and only values that are still to be read
are kept. Where values are large, as in front layers of networks for images, fewer images are walked with; where they
are small again, the others catch up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.core.ir import resolve
from fxquant.core.run import CalibrationSet, GraphReplay, Runner
from fxquant.passes.rounding.closed_form.input_gram import channel_axis

BATCH = 32
LIMIT = 192 * 10**6
"""Bytes that the values of one walk may take."""
SHARE = 4
"""A batch takes at most one part in so many of the limit."""
FEWEST = 8
"""Images that are used whatever the limit."""
WORTH = 1.5
"""Times as many images have to fit for others to catch up."""


def go_to(name: str, *walks: Prefix) -> int:
    """Run every node before this one with as many images as fit, the same in all walks; return how many are left.

    Args:
        name: a node of every walk's graph.
        walks: in batches of one size.
    """
    now = min(len(walk.batches) for walk in walks)
    on_the_way = min(now, *(walk.room(name) for walk in walks))
    for walk in walks:
        walk.use(on_the_way)
        walk.to(name)
    here = min(walk.room(name) for walk in walks)
    if here >= min(WORTH * on_the_way, walks[0].most):
        for walk in walks:
            walk.use(here)
    return sum(walks[0].batches)


class Prefix:
    """The values at the current position in a graph, for every batch of the images.

    Args:
        module: the graph; it is not changed.
        images: the images to run.
        batch: images for each run of a node; None takes as many as a share of the limit holds.
        limit: bytes that values may take while the walk is fitted.
    """

    def __init__(
        self, module: GraphModule, images: CalibrationSet, batch: int | None = None, limit: int = LIMIT
    ) -> None:
        self.module = module
        self._runner = Runner(module)
        self._position = self._runner.position
        # A value that no node reads is kept: `value` may ask for it.
        never = len(self._position)
        self._last_reader = {n: max((self._position[user] for user in n.users), default=never) for n in self._position}
        self._next = 0
        self._settled: dict[str, Callable[[Tensor], Tensor]] = {}
        self._shifts: dict[str, Tensor] = {}
        self._changes: dict[str, list[Callable[[Tensor], Tensor]]] = {}
        #: values that no image reaches, one for all batches
        self._constants: dict[Node, Any] = {}
        self._limit = limit
        footprint = GraphReplay(module).footprint(images.slice(0, 1).inputs, apart=True)
        #: bytes of one image while each node runs
        self._alive = [footprint.alive.get(node, 0) for node in self._runner.nodes]
        fitting = max(1, min(BATCH, limit // SHARE // max(1, footprint.working)))
        #: images for each run of a node
        self.batch = batch or fitting
        self._batches = list(images.batches(self.batch))
        self._values = [self._runner.given(part.inputs) for part in self._batches]

    @property
    def batches(self) -> list[int]:
        """Images of each batch that is walked with."""
        return [len(part) for part in self._batches[: len(self._values)]]

    @property
    def most(self) -> int:
        """Batches of all images."""
        return len(self._batches)

    def room(self, name: str) -> int:
        """Return how many batches keep the values up to and including a node within the limit, at least one."""
        stretch = self._alive[self._next : self._position[resolve(self.module.graph, name)] + 1]
        images = max(FEWEST, self._limit // max(1, *stretch))
        # Whole batches: the last one may hold fewer images.
        return min(max(1, images // self.batch), self.most)

    def use(self, batches: int) -> None:
        """Go on with so many of the batches: values of others are dropped, or made from the start."""
        new = self._batches[len(self._values) : batches]
        del self._values[batches:]
        if not new:
            return
        run = [node for node in self._runner.nodes[: self._next] if node.op not in ("placeholder", "output")]
        constants: dict[Node, Any] = {}
        with torch.no_grad():
            self._runner.run([n for n in run if n not in self._runner.varying], constants, None, self._settled)
            for part in new:
                self._values.append(values := self._runner.given(part.inputs))
                self._advance([n for n in run if n in self._runner.varying], values, constants, self._next)

    def ahead(self) -> Prefix:
        """Return a second walk that starts at this position and does not move this one."""
        other = object.__new__(Prefix)
        other.__dict__.update(self.__dict__)
        other._settled, other._constants = dict(self._settled), dict(self._constants)
        other._shifts, other._changes = dict(self._shifts), {name: list(made) for name, made in self._changes.items()}
        other._values = [dict(values) for values in self._values]
        return other

    def settle(self, name: str, value: Tensor) -> None:
        """Give a node that no image reaches (a quantizer on a weight) this value from now on."""
        node = resolve(self.module.graph, name)
        self._settled[name] = lambda _: value
        if node in self._constants:
            self._constants[node] = value

    def shift(self, name: str, amount: Tensor) -> None:
        """Add this amount for each channel to the output of a weighted op that has not run yet."""
        node = resolve(self.module.graph, name)
        dimensions = node.meta["val"].dim()
        self._shifts[name] = amount.reshape([-1] + [1] * (dimensions - 1 - channel_axis(dimensions, node)))

    def to(self, name: str) -> None:
        """Run every node before this one."""
        self._run(self._position[resolve(self.module.graph, name)])

    def past(self, name: str) -> None:
        """Run every node up to and including this one."""
        self._run(self._position[resolve(self.module.graph, name)] + 1)

    def source(self, name: str) -> list[Tensor]:
        """Return the first argument of a node, batch by batch; call `to(name)` first."""
        source = resolve(self.module.graph, name).args[0]
        assert isinstance(source, Node)
        return [values[source] for values in self._values]

    def value(self, name: str) -> list[Tensor]:
        """Return the value of a node, batch by batch; call `past(name)` first."""
        node = resolve(self.module.graph, name)
        return [values[node] for values in self._values]

    def change(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        """Replace the value of a node by a function of it; call `past(name)` first."""
        node = resolve(self.module.graph, name)
        for values in self._values:
            values[node] = function(values[node])
        self._changes.setdefault(node.name, []).append(function)

    def _changed(self, values: dict[Node, Any], node: Node) -> None:
        if node.name in self._shifts:
            values[node] = values[node] + self._shifts[node.name].to(values[node])
        for function in self._changes.get(node.name, ()):
            values[node] = function(values[node])

    def _advance(self, nodes: list[Node], values: dict[Node, Any], constants: dict[Node, Any], stop: int) -> None:
        def keep(node: Node) -> bool:
            return self._last_reader[node] >= stop

        changed = {node for node in nodes if node.name in self._shifts or node.name in self._changes}
        after = partial(self._changed, values) if changed else None
        self._runner.run(nodes, values, constants, self._settled, keep, after, alone=changed)

    def _run(self, stop: int) -> None:
        runner = self._runner
        ahead = [node for node in runner.nodes[self._next : stop] if node.op not in ("placeholder", "output")]
        self._next = max(self._next, stop)

        with torch.no_grad():
            runner.run([node for node in ahead if node not in runner.varying], self._constants, None, self._settled)
            varying = [node for node in ahead if node in runner.varying]
            for values in self._values:
                self._advance(varying, values, self._constants, stop)
        self._constants = {node: value for node, value in self._constants.items() if self._last_reader[node] >= stop}
