"""A network run up to one node after the other, over all images, so that a decision at one layer reaches the next.

Sequential algorithms (GPTQ, GPFQ, bias correction) decide on a layer from the outputs of the decided layers before it.
One walk through the graph serves all layers: no node runs twice, and only values that are still to be read are kept.
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
LIMIT = 10**9
"""Bytes that the values of one walk may take."""
FEWEST = 8
"""Images that are used whatever the limit."""


def fitting(module: GraphModule, images: CalibrationSet, limit: int = LIMIT) -> CalibrationSet:
    """Return the first of the images, as many as keep a walk's values within `limit` bytes, at least 8.

    Args:
        module: the graph to run.
        images: all images available.
        limit: bytes.
    """
    for_one = GraphReplay(module).footprint(images.slice(0, 1).inputs).working
    return images.slice(0, max(FEWEST, limit // max(1, for_one)))


class Prefix:
    """The values at the current position in a graph, for every batch of the images.

    Args:
        module: the graph; it is not changed.
        images: the images to run.
        batch: images for each run of a node.
    """

    def __init__(self, module: GraphModule, images: CalibrationSet, batch: int = BATCH) -> None:
        self.module = module
        self._runner = Runner(module)
        self._position = self._runner.position
        # A value that no node reads is kept: `value` may ask for it.
        never = len(self._position)
        self._last_reader = {n: max((self._position[user] for user in n.users), default=never) for n in self._position}
        self._next = 0
        self._settled: dict[str, Callable[[Tensor], Tensor]] = {}
        self._shifts: dict[str, Tensor] = {}
        #: values that no image reaches, one for all batches
        self._constants: dict[Node, Any] = {}
        self._values = [self._runner.given(part.inputs) for part in images.batches(batch)]

    def ahead(self) -> Prefix:
        """Return a second walk that starts at this position and does not move this one."""
        other = object.__new__(Prefix)
        other.__dict__.update(self.__dict__)
        other._settled, other._constants = dict(self._settled), dict(self._constants)
        other._shifts = dict(self._shifts)
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

    def _shifted(self, values: dict[Node, Any], node: Node) -> None:
        if node.name in self._shifts:
            values[node] = values[node] + self._shifts[node.name].to(values[node])

    def _run(self, stop: int) -> None:
        runner = self._runner
        ahead = [node for node in runner.nodes[self._next : stop] if node.op not in ("placeholder", "output")]
        self._next = max(self._next, stop)

        def keep(node: Node) -> bool:
            return self._last_reader[node] >= stop

        with torch.no_grad():
            runner.run([node for node in ahead if node not in runner.varying], self._constants, None, self._settled)
            varying = [node for node in ahead if node in runner.varying]
            for values in self._values:
                runner.run(varying, values, self._constants, self._settled, keep, partial(self._shifted, values))
        self._constants = {node: value for node, value in self._constants.items() if keep(node)}
