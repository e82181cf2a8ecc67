"""Units from the graph: where a network can be cut into pieces that are reconstructed one after the other.

A cut is a place in the order of nodes that few values cross. Where one value crosses, residual blocks and the halves of
transformer blocks fall out by themselves; where long skips keep more alive, cuts of two, three and more values divide
what would be too large a piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxquant.core.errors import OptionError
from fxquant.core.ir import ScaleRule, Site, rule_of, shape_of, traced_images
from fxquant.core.run import is_quantizer, is_size, is_tensor, varying_nodes

LARGEST = 8
"""Weighted ops of a piece beyond which it is cut at wider places too."""
WIDEST = 16
"""Values that may cross such a place."""

GRANULARITIES = ("layer", "block", "stage", "network")


@dataclass(frozen=True)
class Unit:
    """A piece of a simulated graph.

    Args:
        name: its first site.
        nodes: names of its varying nodes, in graph order.
        inputs: names of the values it reads from before.
        outputs: names of its values that are read behind it.
        sites: the sites whose weights it holds.
    """

    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sites: tuple[str, ...]


def check_granularity(granularity: str) -> None:
    """Fail on a granularity that `find_units` does not know.

    Raises:
        OptionError: it is unknown.
    """
    if granularity not in GRANULARITIES and not (granularity.isdecimal() and int(granularity) > 0):
        raise OptionError(f"unit={granularity!r} is unknown; known: {', '.join(GRANULARITIES)}, or a number of blocks")


def find_units(module: GraphModule, sites: tuple[Site, ...], granularity: str = "block") -> tuple[Unit, ...]:
    """Return the units of a simulated graph in order; each varying node belongs to exactly one.

    Args:
        module: simulated graph.
        sites: the sites it quantizes, at least one.
        granularity: "layer" (one weighted op), "block" (between cuts of one value), a number k as text (k neighbouring
            blocks, the cross-layer window of UWC), "stage" (blocks of one image size) or "network".

    Raises:
        OptionError: the granularity is unknown.
    """
    check_granularity(granularity)
    cutter = _Cutter(module, sites)
    if granularity == "network":
        return cutter.units([0])
    if granularity == "layer":
        return cutter.units(cutter.before_layers())
    blocks = cutter.blocks()
    if granularity == "stage":
        return cutter.units(cutter.between_sizes(blocks))
    return cutter.units(blocks[:: int(granularity)] if granularity.isdigit() else blocks)


class _Cutter:
    """Boundaries are positions in the order of varying nodes; 0 is always one."""

    def __init__(self, module: GraphModule, sites: tuple[Site, ...]) -> None:
        self.module = module
        self.nodes: list[Node] = varying_nodes(module.graph)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.site_of = {name: site.name for site in sites for name in site.nodes}
        self.live = self._live()

    def _live(self) -> list[list[Node]]:
        """Return for each boundary the values that cross it: made before, read behind."""
        live: list[list[Node]] = [[] for _ in range(len(self.nodes) + 1)]
        starts = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        for node in (*starts, *self.nodes):
            made = self.position.get(node, -1)
            read = max((self.position.get(user, len(self.nodes)) for user in node.users), default=made)
            # Sizes are worked out anew wherever they are read.
            for boundary in range(made + 1, read + 1) if not is_size(node) else ():
                live[boundary].append(node)
        return live

    def before_layers(self) -> list[int]:
        """Return a boundary before each weighted op but the first, where the values that cross can be cached."""
        layers = [index for index, node in enumerate(self.nodes) if node.name in self.site_of]
        return [0, *(index for index in layers[1:] if self._cacheable(index))]

    def blocks(self) -> list[int]:
        """Return the boundaries between pieces with weights, cut as narrowly as their size allows."""
        return self._with_weights([0, *self._divided(0, len(self.nodes), 1)])

    def _divided(self, start: int, stop: int, width: int) -> list[int]:
        """Return boundaries inside (start, stop) that at most `width` values cross, more where a piece is too large."""
        inside = [b for b in range(start + 1, stop) if self._width(b) <= width and self._may_cut(b)]
        if width == WIDEST:
            return inside
        found: list[int] = []
        for low, high in zip([start, *inside], [*inside, stop], strict=True):
            found += [low] if low != start else []
            if self._layers(low, high) > LARGEST:
                found += self._divided(low, high, width + 1)
        return found

    def _width(self, boundary: int) -> int:
        """Return how many values cross a boundary; one that crosses in float and quantized counts once."""
        crossing = self.live[boundary]
        return len({node.args[0] if is_quantizer(self.module, node) else node for node in crossing})

    def between_sizes(self, blocks: list[int]) -> list[int]:
        """Return those boundaries at which the values have another image size than at the boundary before."""
        sizes = [tuple(shape_of(node)[2:] for node in self.live[boundary]) for boundary in blocks]
        return [blocks[k] for k in range(len(blocks)) if k == 0 or (sizes[k] != sizes[k - 1] and k > 1)]

    def _may_cut(self, boundary: int) -> bool:
        node = self.nodes[boundary]
        rule = rule_of(node)
        # A value belongs together with its activation function, absorbed by the kernel or not, and with its quantizer.
        alone = all(len(source.users) == 1 for source in node.all_input_nodes)
        function = rule is not None and (rule.scale is ScaleRule.ABSORB or (rule.pointwise and alone))
        return not function and not is_quantizer(self.module, node) and self._cacheable(boundary)

    def _cacheable(self, boundary: int) -> bool:
        images = traced_images(self.module.graph)
        return all(is_tensor(node) and shape_of(node)[:1] == (images,) for node in self.live[boundary])

    def _layers(self, start: int, stop: int) -> int:
        return sum(node.name in self.site_of for node in self.nodes[start:stop])

    def _with_weights(self, boundaries: list[int]) -> list[int]:
        """Drop boundaries so that every piece holds a weighted op; what has none goes to the piece behind it."""
        kept = []
        start = 0
        for stop in [*boundaries[1:], len(self.nodes)]:
            if self._layers(start, stop):
                kept.append(start)
                start = stop
        # What follows the last weighted op has no piece behind it.
        return kept or [0]

    def units(self, boundaries: list[int]) -> tuple[Unit, ...]:
        """Return the pieces between the boundaries."""
        return tuple(
            self._unit(self.nodes[low:high])
            for low, high in zip(boundaries, [*boundaries[1:], len(self.nodes)], strict=True)
        )

    def _unit(self, nodes: list[Node]) -> Unit:
        inside = set(nodes)
        varying = _in_order(self.position, lambda node: node not in inside and not is_size(node))
        sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if varying(source))
        outputs = [n for n in nodes if not is_size(n) and any(user not in inside for user in n.users)]
        held = dict.fromkeys(self.site_of[n.name] for n in nodes if n.name in self.site_of)
        own, read, given = (tuple(n.name for n in each) for each in (nodes, sources, outputs))
        return Unit(next(iter(held)), own, read, given, tuple(held))


def _in_order(position: dict[Node, int], wanted: Callable[[Node], bool]) -> Callable[[Node], bool]:
    return lambda node: (node in position or node.op == "placeholder") and wanted(node)
