"""Units of a network: the pieces that are reconstructed one after the other, found from its graph.

A cut is a position in the order of nodes that few values cross. Cuts of one value give residual blocks and the halves
of transformer blocks; where long skips cross every cut, cuts of two, three and more values divide pieces that would be
too large.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxquant.core.errors import OptionError
from fxquant.core.ir import ScaleRule, Site, images_axis, rule_of, shape_of, traced_images
from fxquant.core.run import is_quantizer, is_size, is_tensor, placeholders, varying_nodes

LARGEST = 8
"""Most weighted ops of a piece; a larger one is divided at cuts of more values."""
WIDEST = 16
"""Most values that may cross a cut."""

GRANULARITIES = ("layer", "block", "stage", "network")
LAYERS = "layers:"
"""Before a number of neighbouring weighted ops."""


@dataclass(frozen=True)
class Unit:
    """A piece of a simulated graph.

    Args:
        name: its first site.
        nodes: names of its varying nodes, in graph order.
        inputs: names of the values of earlier nodes that it reads.
        outputs: names of its values that later nodes read.
        sites: the sites whose weights it reads.
    """

    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sites: tuple[str, ...]


def check_granularity(granularity: str) -> None:
    """Check a granularity for `find_units`.

    Raises:
        OptionError: it is unknown.
    """
    number = granularity.removeprefix(LAYERS)
    if granularity not in GRANULARITIES and not (number.isdecimal() and int(number) > 0):
        raise OptionError(
            f"unit={granularity!r} is unknown; known: {', '.join(GRANULARITIES)}, a number of blocks, or {LAYERS} and "
            f"a number, for example {LAYERS}2"
        )


def find_units(module: GraphModule, sites: tuple[Site, ...], granularity: str = "block") -> tuple[Unit, ...]:
    """Return the units of a simulated graph in order; each varying node belongs to exactly one.

    Args:
        module: simulated graph.
        sites: the sites it quantizes, at least one.
        granularity: "layer" (one weighted op), "layers:k" (k neighbouring ones, the basic unit of UWC, arXiv
            2201.06376), "block" (between cuts of one value), a number k as text (k neighbouring blocks), "stage"
            (blocks of one image size) or "network".

    Raises:
        OptionError: the granularity is unknown.
    """
    check_granularity(granularity)
    cutter = _Cutter(module, sites)
    if granularity == "network":
        return cutter.units([0])
    if granularity == "layer":
        return cutter.units(cutter.before_layers(1))
    if granularity.startswith(LAYERS):
        return cutter.units(cutter.before_layers(int(granularity.removeprefix(LAYERS))))
    blocks = cutter.blocks()
    if granularity == "stage":
        return cutter.units(cutter.between_sizes(blocks))
    return cutter.units(blocks[:: int(granularity)] if granularity.isdigit() else blocks)


def counts_along_first(node: Node) -> bool:
    """Whether axis 0 of a node's tensor counts images and nothing else."""
    return shape_of(node)[:1] == (traced_images(node.graph),) and images_axis(node) in (0, None)


class _Cutter:
    """Boundaries are positions in the order of varying nodes; 0 is always one."""

    def __init__(self, module: GraphModule, sites: tuple[Site, ...]) -> None:
        self.module = module
        self.inputs, self.nodes = placeholders(module.graph), varying_nodes(module.graph)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.site_of = {name: site.name for site in sites for name in site.nodes}
        self.live = self._live()

    def _live(self) -> list[list[Node]]:
        """Return for each boundary the values that cross it: computed before, read behind."""
        live: list[list[Node]] = [[] for _ in range(len(self.nodes) + 1)]
        for node in (*self.inputs, *self.nodes):
            made = self.position.get(node, -1)
            # A reader without position is the output.
            read = max((self.position.get(user, len(self.nodes)) for user in node.users), default=made)
            # A size crosses no cut: every span gets it from its number of images.
            for boundary in range(made + 1, read + 1) if not is_size(node) else ():
                live[boundary].append(node)
        return live

    def before_layers(self, count: int) -> list[int]:
        """Return 0 and the boundaries before weighted ops that follow `count` others or more.

        A piece grows beyond that where the values that cross the boundary cannot be kept.
        """
        layers = [index for index, node in enumerate(self.nodes) if node.name in self.site_of]
        kept, held = [0], 1
        for index in layers[1:]:
            if held >= count and self._cacheable(index):
                kept.append(index)
                held = 0
            held += 1
        return kept

    def blocks(self) -> list[int]:
        """Return the boundaries between pieces with weights, each crossed by as few values as their size allows."""
        return self._with_weights([0, *self._divided(0, len(self.nodes), 1)])

    def _divided(self, start: int, stop: int, width: int) -> list[int]:
        """Return boundaries inside (start, stop) that at most `width` values cross; more where pieces are too large."""
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
        """Return the number of values that cross a boundary; float and quantized copies of one count once."""
        crossing = self.live[boundary]
        return len({node.args[0] if is_quantizer(self.module, node) else node for node in crossing})

    def between_sizes(self, blocks: list[int]) -> list[int]:
        """Return the boundaries at which the image size of values differs from the boundary before."""
        sizes = [tuple(shape_of(node)[2:] for node in self.live[boundary]) for boundary in blocks]
        return [blocks[k] for k in range(len(blocks)) if k == 0 or (sizes[k] != sizes[k - 1] and k > 1)]

    def _may_cut(self, boundary: int) -> bool:
        node = self.nodes[boundary]
        rule = rule_of(node)
        # Not between a value and its activation function (absorbed by the kernel or not) or its quantizer.
        alone = all(len(source.users) == 1 for source in node.all_input_nodes)
        function = rule is not None and (rule.scale is ScaleRule.ABSORB or (rule.pointwise and alone))
        return not function and not is_quantizer(self.module, node) and self._cacheable(boundary)

    def _cacheable(self, boundary: int) -> bool:
        return all(is_tensor(node) and counts_along_first(node) for node in self.live[boundary])

    def _layers(self, start: int, stop: int) -> int:
        return sum(node.name in self.site_of for node in self.nodes[start:stop])

    def _with_weights(self, boundaries: list[int]) -> list[int]:
        """Drop boundaries so that every piece has a weighted op; nodes without one join the next piece."""
        kept = []
        start = 0
        for stop in [*boundaries[1:], len(self.nodes)]:
            if self._layers(start, stop):
                kept.append(start)
                start = stop
        # Nodes behind the last weighted op join its piece: no boundary is kept for them.
        return kept or [0]

    def units(self, boundaries: list[int]) -> tuple[Unit, ...]:
        """Return the pieces between the boundaries."""
        return tuple(
            self._unit(self.nodes[low:high])
            for low, high in zip(boundaries, [*boundaries[1:], len(self.nodes)], strict=True)
        )

    def _unit(self, nodes: list[Node]) -> Unit:
        inside = set(nodes)
        outside = {node for node in (*self.inputs, *self.nodes) if node not in inside and not is_size(node)}
        sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source in outside)
        outputs = [n for n in nodes if not is_size(n) and any(user not in inside for user in n.users)]
        held = dict.fromkeys(self.site_of[n.name] for n in nodes if n.name in self.site_of)
        own, read, given = (tuple(n.name for n in each) for each in (nodes, sources, outputs))
        return Unit(next(iter(held)), own, read, given, tuple(held))
