"""A network run node by node over all images at once, so that what is decided at one layer reaches the next.

Sequential algorithms (GPTQ, GPFQ, bias correction) settle a layer on what the settled layers before it give. One walk
through the graph does it: only values that are still to be read are kept, and no node runs twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxquant.core.ir import resolve
from fxquant.core.run import CalibrationSet, GraphReplay

BATCH = 32
LIMIT = 10**9
"""Bytes that the values of one walk may take."""
FEWEST = 8
"""Images that are walked with in any case."""


def fitting(module: GraphModule, images: CalibrationSet, limit: int = LIMIT) -> CalibrationSet:
    """Return the first of the images, as many as keep a walk's values within `limit` bytes, at least 8.

    Args:
        module: the graph that is walked.
        images: all there are.
        limit: bytes.
    """
    for_one = GraphReplay(module).footprint(images.slice(0, 1).inputs).working
    return images.slice(0, max(FEWEST, limit // max(1, for_one)))


class Prefix:
    """The values at the front of a walk through a graph, for every batch of the images.

    Args:
        module: the graph; it is read, never written.
        images: what runs through it.
        batch: images for each run of a node.
    """

    def __init__(self, module: GraphModule, images: CalibrationSet, batch: int = BATCH) -> None:
        self.module = module
        self._nodes: list[Node] = list(module.graph.nodes)
        self._position = {node: index for index, node in enumerate(self._nodes)}
        self._runner = Interpreter(module, garbage_collect_values=False)
        self._next = 0
        self._settled: dict[Node, Tensor] = {}
        placeholders = [node for node in self._nodes if node.op == "placeholder"]
        self._values: list[dict[Node, Any]] = [
            dict(zip(placeholders, part.inputs, strict=False)) for part in images.batches(batch)
        ]
        self._varying: set[Node] = set(placeholders)
        for node in self._nodes:
            if any(source in self._varying for source in node.all_input_nodes):
                self._varying.add(node)

    def ahead(self) -> Prefix:
        """Return a second walk that starts where this one stands and leaves it there."""
        other = object.__new__(Prefix)
        other.__dict__.update(self.__dict__)
        other._settled = dict(self._settled)
        other._values = [dict(values) for values in self._values]
        return other

    def settle(self, name: str, value: Tensor) -> None:
        """Let a node that no image reaches (a quantizer on a weight) have this value from now on."""
        node = resolve(self.module.graph, name)
        self._settled[node] = value
        for values in self._values:
            if node in values:
                values[node] = value

    def to(self, name: str) -> None:
        """Run every node before this one."""
        self._run(self._position[resolve(self.module.graph, name)])

    def past(self, name: str) -> None:
        """Run every node up to and with this one."""
        self._run(self._position[resolve(self.module.graph, name)] + 1)

    def source(self, name: str) -> list[Tensor]:
        """Return the first argument of a node, batch by batch; the walk must stand right before the node."""
        source = resolve(self.module.graph, name).args[0]
        assert isinstance(source, Node)
        return [values[source] for values in self._values]

    def value(self, name: str) -> list[Tensor]:
        """Return what a node gave, batch by batch; the walk must stand right behind it."""
        node = resolve(self.module.graph, name)
        return [values[node] for values in self._values]

    def change(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        """Put a function of what a node gave in its place; the walk must stand right behind it."""
        node = resolve(self.module.graph, name)
        for values in self._values:
            values[node] = function(values[node])

    def _run(self, stop: int) -> None:
        with torch.no_grad():
            while self._next < stop:
                node = self._nodes[self._next]
                self._next += 1
                if node.op in ("placeholder", "output"):
                    continue
                self._compute(node)
                for source in {node, *node.all_input_nodes}:
                    # The node just run stays for one step even if nobody reads it, to be looked at.
                    if source is not node and all(self._position[user] < self._next for user in source.users):
                        for values in self._values:
                            values.pop(source, None)

    def _compute(self, node: Node) -> None:
        if node in self._settled:
            for values in self._values:
                values[node] = self._settled[node]
            return
        once: Any = None
        for index, values in enumerate(self._values):
            if index == 0 or node in self._varying:
                self._runner.env = values
                once = self._runner.run_node(node)
            values[node] = once
