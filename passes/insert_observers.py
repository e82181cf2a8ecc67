"""Insert an observer on every value that carries a quantizer, and take them out again with what they saw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule

from fxquant.core.facts import Ranges
from fxquant.core.ir import Program, QuantizedEdges, finish, fork, insert_after, nodes_by_name, resolve, rule_of
from fxquant.core.run import OBSERVERS, Observer
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Put an observer node, called `observe_<producer>`, on the edges of each producer that some plan quantizes.

    Args:
        observer: name of the observer, in `OBSERVERS`.
    """

    observer: str = "mse"
    reads = (QuantizedEdges,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the graph with observers; running it on images fills them."""
        make = OBSERVERS[self.observer]
        edges = (*program[QuantizedEdges].edges, *program[QuantizedEdges].unrounded)
        graph = program.module.graph
        producers = dict.fromkeys(edge.producer for edge in edges)
        for producer in producers:
            users = [resolve(graph, edge.consumer) for edge in edges if edge.producer == producer]
            insert_after(program.module, resolve(graph, producer), f"observe_{producer}", make(producer), users)
        return program, len(producers)


@dataclass(frozen=True)
class CollectRanges(Pass):
    """Erase the observers and write what they saw as `Ranges`."""

    writes = (Ranges,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the graph without observers, and the ranges."""
        histograms, clips, nodes = {}, set(), nodes_by_name(program.module.graph)
        for observer in _taken_out(program.module):
            histograms[observer.producer] = observer.histogram()
            clips.add(observer.clip)
        # One observer made them all; a graph without any has nothing to clip.
        rules = {name: rule_of(nodes[name]) for name in histograms}
        factors = frozenset(name for name, rule in rules.items() if rule is not None and rule.factor)
        return program.with_facts(Ranges(histograms, next(iter(clips), "full"), factors)), len(histograms)


def without_observers(module: GraphModule) -> GraphModule:
    """Return a copy of a graph without its observers, which keep what they saw; parameters are shared."""
    copied = fork(module)
    for _ in _taken_out(copied):
        pass
    return finish(copied)


def _taken_out(module: GraphModule) -> Iterator[Observer]:
    """Erase the observers from a graph, and yield each of them."""
    for node in list(module.graph.nodes):
        observer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(observer, Observer):
            yield observer
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
