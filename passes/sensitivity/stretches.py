"""Which columns are replayed on how many images at once: more of them the deeper a column lies.

A replay needs the values that are read behind its column only. In networks for images those are few where they are
deep, so that many images fit, which convolutions of small images need to be quick (MobileNetV2, one thread: the last
layers take 1.1 ms an image in sixes, 1.6 in twos).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from torch.fx import Node

from fxquant.core.run import dependents
from fxquant.passes.sensitivity.scorer import ENVIRONMENT_LIMIT, Scorer

TOGETHER = 6
"""Images of a cell where a batch of the scorer is smaller."""
STEP = 3
"""Times as many images that the next stretch runs at once."""
ANSWERS_LIMIT = 256 * 10**6
"""Bytes of the answers to all columns that are held for a cell."""


@dataclass(frozen=True)
class Stretch:
    """Columns that lie next to each other.

    Args:
        columns: their numbers.
        images: that are run at once.
        kept: nodes whose values replays of these columns may read; None for all.
    """

    columns: tuple[int, ...]
    images: int
    kept: frozenset[Node] | None


def images_of_a_cell(scorer: Scorer) -> int:
    """Return how many images one cell of single substitutions holds."""
    answers = len(scorer.columns) * scorer.answer_bytes
    # The run that a stretch starts from goes through the front of the network too.
    running = ENVIRONMENT_LIMIT // max(1, scorer.footprint.working)
    return max(scorer.batch, min(TOGETHER, len(scorer.images), running, ANSWERS_LIMIT // max(1, answers)))


def stretches(scorer: Scorer) -> list[Stretch]:
    """Return the columns from front to back, divided where more images fit into `ENVIRONMENT_LIMIT`."""
    most, sizes = images_of_a_cell(scorer), [scorer.batch]
    while sizes[-1] < most:
        sizes.append(min(most, STEP * sizes[-1]))
    weighed = _Weighed(scorer)
    starts = {k: weighed.start(column.substitution) for k, column in enumerate(scorer.columns)}
    order = sorted(starts, key=starts.__getitem__)

    def fitting(column: int) -> int:
        room = ENVIRONMENT_LIMIT // max(1, weighed.bytes_behind(starts[column]))
        return max([size for size in sizes if size <= room], default=0)

    found = []
    for images, members in groupby(order, key=fitting):
        columns = tuple(members)
        kept = weighed.read_behind(starts[columns[0]]) if images else scorer.parts_kept
        found.append(Stretch(columns, images or scorer.batch, kept))
    return found


class _Weighed:
    """Knows which values are read behind a position of the graph, and their bytes for one image."""

    def __init__(self, scorer: Scorer) -> None:
        self._replay = replay = scorer.replay
        sizes = dict(scorer.footprint.values)
        #: node -> the node whose storage its value lies in, with its bytes
        self._storage = dict[Node, tuple[Node, int]]()
        for node in replay.nodes:
            if node not in replay.varying:
                continue
            sources = [source for source in node.all_input_nodes if source in self._storage]
            viewed = node not in sizes and bool(sources)
            self._storage[node] = self._storage[sources[0]] if viewed else (node, sizes.get(node, 0))
        position = replay.position
        last = {node: max((position[user] for user in node.users), default=0) for node in self._storage}
        # Values that kernels need not make, between a convolution and the clip behind it, are not asked for.
        self._last_reader = {node: at for node, at in last.items() if node not in replay.clips}
        self._known = dict[int, int]()

    def start(self, changed: Iterable[str]) -> int:
        """Return the position of the first value that a change of these nodes changes."""
        replay = self._replay
        run = dependents(replay.nodes, {replay.by_name[name] for name in changed})
        return min((replay.position[node] for node in run if node in replay.varying), default=len(replay.nodes))

    def read_behind(self, start: int) -> frozenset[Node]:
        """Return the values that a node at the position or behind it reads."""
        return frozenset(node for node, at in self._last_reader.items() if at >= start)

    def bytes_behind(self, start: int) -> int:
        """Return the bytes of these values."""
        if start not in self._known:
            self._known[start] = sum(dict(self._storage[node] for node in self.read_behind(start)).values())
        return self._known[start]
