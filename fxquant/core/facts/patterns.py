"""Patterns that name layers: globs, regular expressions, and types."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from torch.fx import Graph, Node

from fxquant.core.errors import OptionError
from fxquant.core.facts.expressions import matched
from fxquant.core.ir import Site

Types = Mapping[str, Collection[str]]
"""Layer name -> its types: the kind of its op, and the classes of its module and of those around it."""


def module_types(node: Node) -> set[str]:
    """Return the class names of the modules that a node was called in, each with and without its package."""
    found: set[str] = set()
    # Exported programs have names there, graphs of torch.compile the classes themselves.
    for _, kind in node.meta.get("nn_module_stack", {}).values():
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        found |= {name, name.rpartition(".")[2]}
    return found


def site_types(graph: Graph, sites: Sequence[Site]) -> dict[str, set[str]]:
    """Return the types of each site, for `matching`."""
    nodes = {node.name: node for node in graph.nodes}
    return {site.name: {site.kind}.union(*(module_types(nodes[name]) for name in site.nodes)) for site in sites}


def found(pattern: str, names: Sequence[str], types: Types) -> list[str]:
    """Return the names that a pattern matches, none where it matches nothing.

    Args:
        pattern: a glob over names (`layer1.*`), a regular expression for whole names (`re:layer[12]\\..*`), or a glob
            over types (`type:Conv2d`, `type:*Block`, `type:linear`).
        names: the layers' names.
        types: their types.

    Raises:
        OptionError: not a regular expression, or one that takes too long.
    """
    if pattern.startswith("re:"):
        return matched(pattern.removeprefix("re:"), names)
    if pattern.startswith("type:"):
        kind = pattern.removeprefix("type:")
        return [name for name in names if any(fnmatchcase(each, kind) for each in types.get(name, ()))]
    return [name for name in names if fnmatchcase(name, pattern)]


def matching(pattern: str, names: Sequence[str], types: Types) -> list[str]:
    """Return the names that a pattern matches, at least one.

    Args:
        pattern: a glob over names, `re:` and a regular expression for whole names, or `type:` and a glob over types.
        names: the layers' names.
        types: their types.

    Raises:
        OptionError: it matches nothing, the message lists what is near; or it is not a regular expression.
    """
    matches = found(pattern, names, types)
    if not matches:
        known, wanted = list(names), pattern.removeprefix("re:")
        if pattern.startswith("type:"):
            wanted = pattern.removeprefix("type:")
            # Names with their package would list each type twice.
            known = sorted({kind for name in names for kind in types.get(name, ()) if "." not in kind})
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.3) or known[:3]
        raise OptionError(f"pattern {pattern!r} matches no site; near: {', '.join(near)}")
    return matches
