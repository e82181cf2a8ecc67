"""Running some nodes of a graph: which nodes depend on which, and a runner that drops values after their last reader.

All partial execution goes through here: `GraphReplay` runs what a substitution changes, `Prefix` runs up to a node,
the re-estimation of batch norms runs with other statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxquant.core.run.convolutions import channels_last, clips_behind, convolved, in_order, laid_out

Substitution = Mapping[str, Callable[[Tensor], Tensor]]
"""Node name -> function of the node's first input that is run in place of the node."""


def dependents(nodes: Iterable[Node], sources: Iterable[Node]) -> set[Node]:
    """Return the sources and every node that reads one of them, directly or through others.

    Args:
        nodes: the nodes to look at, in graph order.
        sources: nodes to start from.
    """
    found = set(sources)
    for node in nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def placeholders(graph: Graph) -> list[Node]:
    """Return the input nodes of a graph, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def varying_nodes(graph: Graph) -> list[Node]:
    """Return the nodes that depend on the input, placeholders and output left out, in graph order."""
    varying = dependents(graph.nodes, placeholders(graph))
    return [node for node in graph.nodes if node in varying and node.op not in ("placeholder", "output")]


def last_read(order: Sequence[Node]) -> dict[Node, list[Node]]:
    """Return node -> the values that no later node of the order reads, among its value and those it reads."""
    read: set[Node] = set()
    last: dict[Node, list[Node]] = {}
    for node in reversed(order):
        last[node] = [value for value in (node, *node.all_input_nodes) if value not in read]
        read.update(last[node])
    return last


class Runner:
    """Runs nodes of a graph, in whatever gradient mode the caller is in.

    Args:
        module: the graph; its nodes must not change while the runner is in use, its weights may.
        node_cost: node name -> cost of running it once; unnamed nodes count as free.
    """

    def __init__(self, module: GraphModule, node_cost: Mapping[str, float] | None = None) -> None:
        self.module = module
        self._cost = node_cost or {}
        self.nodes: list[Node] = list(module.graph.nodes)
        self.inputs = placeholders(module.graph)
        #: the nodes that can be run: all but the inputs
        self.steps = [node for node in self.nodes if node.op != "placeholder"]
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.by_name = {node.name: node for node in self.nodes}
        self.varying = dependents(self.nodes, self.inputs)
        # Submodule look-up by path is slow enough to show in small networks.
        self._submodules = {n: module.get_submodule(str(n.target)) for n in self.nodes if n.op == "call_module"}
        self._laid_out = {node for node in self.steps if laid_out(node)}
        self._in_order = {node for node in self.steps if self._laid_out and in_order(node)}
        #: convolution -> the clip behind it, which one kernel computes where nothing asks for the value in between
        self.clips = clips_behind(self.steps)
        #: cost of all nodes run so far, in the unit of `node_cost`
        self.spent = 0.0

    def given(self, inputs: Sequence[Tensor]) -> dict[Node, Any]:
        """Return placeholder -> tensor for one tensor per placeholder."""
        return dict(zip(self.inputs, inputs, strict=False))

    def run(
        self,
        order: Sequence[Node],
        values: MutableMapping[Node, Any],
        base: Mapping[Node, Any] | None = None,
        substitution: Substitution | None = None,
        keep: Callable[[Node], bool] | None = None,
        after: Callable[[Node], None] | None = None,
        alone: Collection[Node] = (),
    ) -> None:
        """Run nodes and write their values into `values`.

        Without gradients, a convolution whose value `keep` does not ask for is computed along with the clip behind it
        (`clips_behind`), and no value is kept for it.

        Args:
            order: the nodes, none before one that it reads.
            values: what is known before. A value that `keep` does not ask for is removed once no later node of the
                order reads it.
            base: read where `values` has no entry, and never written.
            substitution: functions that are run in place of nodes.
            keep: whether a value is needed after its last reader; None keeps all.
            after: called with each node that has a value, while that and those it read are still there.
            alone: convolutions that have values of their own in any case.
        """
        fallback, functions = base or {}, substitution or {}

        def fetch(node: Node) -> Any:
            return values[node] if node in values else fallback[node]

        # Where everything is kept, as in most replays of a sweep of pairs, the last readers need not be found.
        last = {} if keep is None else last_read(order)
        together = {} if keep is None else self._together(order, functions, keep, alone)
        made = dict[Node, Tensor]()
        for node in order:
            clip = together.get(node)
            value = None if clip is None else self._clipped(node, clip, fetch)
            if clip is not None and value is not None:
                made[clip] = value
            else:
                values[node] = made.pop(node) if node in made else self.value_of(node, fetch, functions)
            if after is not None and node in values:
                after(node)
            if keep is not None:
                for read in last[node]:
                    if not keep(read):
                        values.pop(read, None)

    def _together(
        self, order: Sequence[Node], functions: Substitution, keep: Callable[[Node], bool], alone: Collection[Node]
    ) -> dict[Node, Node]:
        """Return the convolutions of the order that need no value of their own, with their clips."""
        if not self.clips or torch.is_grad_enabled():
            return {}
        run = set(order)
        return {
            node: clip
            for node in order
            if (clip := self.clips.get(node)) is not None
            and clip in run
            and node.name not in functions
            and clip.name not in functions
            and node not in alone
            and not keep(node)
        }

    def _clipped(self, node: Node, clip: Node, fetch: Callable[[Node], Any]) -> Tensor | None:
        made = convolved(map_arg(node.args, fetch), clip)
        if made is not None:
            self.spent += self._cost.get(node.name, 0.0) + self._cost.get(clip.name, 0.0)
        return made

    def value_of(self, node: Node, fetch: Callable[[Node], Any], substitution: Substitution | None = None) -> Any:
        """Return the value of one node.

        Args:
            node: any but a placeholder.
            fetch: returns the value of a node that this one reads.
            substitution: functions that are run in place of nodes.
        """
        if node.op == "get_attr":
            return attrgetter(str(node.target))(self.module)
        args: Any = map_arg(node.args, fetch)
        if node.op == "output":
            return args[0]
        self.spent += self._cost.get(node.name, 0.0)
        function = None if substitution is None else substitution.get(node.name)
        if function is not None:
            return function(args[0])
        kwargs: Any = map_arg(node.kwargs, fetch)
        return self.compute(node, args, kwargs)

    def compute(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what a node makes of its arguments; subclasses change what a kind of node does."""
        if node in self._laid_out:
            made = None if torch.is_grad_enabled() else convolved(args)
            if made is not None:
                return made
            args = (channels_last(args[0]), *args[1:])
        if node in self._in_order and isinstance(args[0], Tensor):
            args = (args[0].contiguous(), *args[1:])
        if node.op == "call_module":
            return self._submodules[node](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
