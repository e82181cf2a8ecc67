"""Insert an observer on every value that carries a quantizer, and take them out again with what they saw."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.core.facts import Ranges
from fxquant.core.ir import Program, QuantizedEdges, insert_after, resolve
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
        histograms, clips = {}, set()
        for node in list(program.module.graph.nodes):
            if node.op != "call_module":
                continue
            observer = program.module.get_submodule(str(node.target))
            if isinstance(observer, Observer):
                histograms[observer.producer] = observer.histogram()
                clips.add(observer.clip)
                node.replace_all_uses_with(node.args[0])
                program.module.graph.erase_node(node)
        # One observer made them all; a graph without any has nothing to clip.
        return program.with_facts(Ranges(histograms, next(iter(clips), "full"))), len(histograms)
