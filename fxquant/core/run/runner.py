"""Running some nodes of a graph: which nodes depend on which, and a runner that drops values after their last reader.

All partial execution goes through here: `GraphReplay` runs what a substitution changes, `Prefix` runs up to a node,
the re-estimation of batch norms runs with other statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

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
    ) -> None:
        """Run nodes and write their values into `values`.

        Args:
            order: the nodes, none before one that it reads.
            values: what is known before. A value that `keep` does not ask for is removed once no later node of the
                order reads it.
            base: read where `values` has no entry, and never written.
            substitution: functions that are run in place of nodes.
            keep: whether a value is needed after its last reader; None keeps all.
            after: called with each node while its value and those it read are still there.
        """
        fallback, functions = base or {}, substitution or {}

        def fetch(node: Node) -> Any:
            return values[node] if node in values else fallback[node]

        # Where everything is kept, as in most replays of a sweep of pairs, the last readers need not be found.
        last = {} if keep is None else last_read(order)
        for node in order:
            values[node] = self.value_of(node, fetch, functions)
            if after is not None:
                after(node)
            if keep is not None:
                for read in last[node]:
                    if not keep(read):
                        values.pop(read, None)

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
        if node.op == "call_module":
            return self._submodules[node](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
