"""The graph cut around one unit, and the nodes whose values losses compare."""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.core.ir import Site
from fxquant.core.run import Span, cut_span, is_tensor
from fxquant.passes.rounding.learned.units import Unit, counts_along_first


class Cut:
    """The graph cut around one unit: the unit in float, the unit quantized one way or another, the float suffix.

    Args:
        module: bare simulated graph.
        units: all units.
        index: position of this one.
        wanted: names of the values that losses read: the answer and perhaps the feature.
    """

    def __init__(self, module: GraphModule, units: tuple[Unit, ...], index: int, wanted: tuple[str, ...]) -> None:
        self.unit, self.index, self._module = units[index], index, module
        unit = self.unit
        self.floats = cut_span(module, unit.nodes, unit.outputs, quantized=False)
        behind = [name for later in units[index + 1 :] for name in later.nodes]
        outputs = dict.fromkeys(name for name in wanted if name in set(behind))
        self._computed = {*behind, *unit.nodes}
        self._returned = tuple(dict.fromkeys((*unit.outputs, *(name for name in wanted if name in unit.nodes))))
        self.suffix: Span | None = None
        if outputs:
            self.suffix = cut_span(module, behind, outputs, quantized=False)

    def quantized(self, places: dict[str, nn.Module]) -> Span:
        """Return the unit with these modules in place of its quantizers."""
        return cut_span(self._module, self.unit.nodes, self._returned, quantized=True, replacements=places)

    def computes(self, name: str | None) -> bool:
        """Whether the unit or a later one computes a value."""
        return name in self._computed


def answer_of(module: GraphModule) -> str:
    """Return the name of the node that losses compare: the first tensor of the output."""
    return next(source.name for source in module.graph.output_node().all_input_nodes if is_tensor(source))


def feature_of(module: GraphModule, sites: tuple[Site, ...]) -> str | None:
    """Return the name of the input of the last weighted op, None for a single op and without images along axis 0."""
    if len(sites) < 2:
        return None
    source = next(node for node in module.graph.nodes if node.name == sites[-1].nodes[-1]).args[0]
    return source.name if isinstance(source, Node) and counts_along_first(source) else None
