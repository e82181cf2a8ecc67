"""Bytes of the values of one run, and which values to keep when they do not all fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from torch import Tensor
from torch.fx import Graph, Node

from fxquant.core.ir import shape_of
from fxquant.core.run.runner import last_read


@dataclass(frozen=True)
class Footprint:
    """Bytes of one run of a graph on given inputs, without inputs, weights and what is computed from weights alone.

    Args:
        values: nodes whose value has a storage of its own, in graph order, with that storage's bytes.
        working: most bytes alive at once when each value is dropped after its last reader.
        alive: node -> bytes alive then, its own value among them.
    """

    values: tuple[tuple[Node, int], ...]
    working: int
    alive: Mapping[Node, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all values together, views counted with what they view."""
        return sum(size for _, size in self.values)

    def within(self, limit: int, cost: Mapping[str, float]) -> frozenset[Node] | None:
        """Return the values to keep in `limit` bytes; None where all fit.

        The graph is divided into stretches of equal cost, as many as fit, and each keeps its lightest value: computing
        a dropped value again then costs `cost / stretches` on average. Remaining room goes to the lightest others.

        Args:
            limit: bytes.
            cost: node name -> cost of running it once; unnamed nodes count as free.
        """
        if self.total <= limit:
            return None
        stretches = len(self.values)
        kept = self._spread(stretches, cost)
        while stretches and sum(kept.values()) > limit:
            stretches = stretches * 3 // 4
            kept = self._spread(stretches, cost)
        left = limit - sum(kept.values())
        for node, size in sorted(self.values, key=lambda value: value[1]):
            if node not in kept and size <= left:
                kept[node] = size
                left -= size
        return frozenset(kept)

    def _spread(self, stretches: int, cost: Mapping[str, float]) -> dict[Node, int]:
        """Return the lightest value of each stretch; of equally light ones the last."""
        if not stretches:
            return {}
        # One unit each on top of the cost, so that free nodes are not all in one stretch.
        whole = sum(cost.get(node.name, 0.0) + 1.0 for node, _ in self.values)
        best: dict[int, tuple[Node, int]] = {}
        passed = 0.0
        for node, size in self.values:
            stretch = min(stretches - 1, int(passed / whole * stretches))
            passed += cost.get(node.name, 0.0) + 1.0
            if stretch not in best or size <= best[stretch][1]:
                best[stretch] = (node, size)
        return dict(best.values())


def live_bytes(graph: Graph) -> int:
    """Return the most bytes that values take at once in a run of one image, from the traced shapes.

    A value is alive from its node to its last reader; views count as values of their own, weights not at all.
    """
    last = last_read(list(graph.nodes))
    traced = next((shape_of(node)[:1] for node in graph.nodes if node.op == "placeholder" and shape_of(node)), (1,))
    alive, most = 0, 0
    sizes: dict[Node, int] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "get_attr" and isinstance(value, Tensor):
            sizes[node] = prod(shape_of(node)) * value.dtype.itemsize // max(1, traced[0])
        alive += sizes.get(node, 0)
        most = max(most, alive)
        alive -= sum(sizes.get(done, 0) for done in last[node] if done is not node)
    return most


def storages(values: Mapping[Node, object]) -> dict[int, int]:
    """Return address -> bytes of every storage of the tensors, inside tuples, lists and mappings too."""
    found: dict[int, int] = {}
    waiting = list(values.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
    return found
