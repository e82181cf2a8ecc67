"""The first and the last layers of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.fx import Graph, Node

from fxquant.core.ir.spec import Site


def end_sites(graph: Graph, sites: Iterable[Site]) -> tuple[str, ...]:
    """Return the names of the sites between which and an input, or an output, of the graph there is no other site.

    Args:
        graph: that the sites are of.
        sites: in the order in which the names are returned.
    """
    sites = tuple(sites)
    owners = {node: site.name for site in sites for node in site.readers}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    first = _nearest(inputs, owners, lambda node: node.users)
    last = _nearest([graph.output_node()], owners, lambda node: node.all_input_nodes)
    return tuple(site.name for site in sites if site.name in first | last)


def _nearest(starts: list[Node], owners: dict[str, str], beyond: Callable[[Node], Iterable[Node]]) -> set[str]:
    """Return the sites that are reached from some nodes before any other site."""
    waiting, seen, found = list(starts), set[Node](), set[str]()
    while waiting:
        node = waiting.pop()
        if node in seen or isinstance(node.meta.get("val"), int | torch.SymInt):
            # Sizes of an image reach every reshape.
            continue
        seen.add(node)
        if node.name in owners:
            found.add(owners[node.name])
        else:
            waiting.extend(beyond(node))
    return found
