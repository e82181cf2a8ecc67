"""Patterns that name layers: globs, regular expressions, and types."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from torch.fx import Graph, Node

from fxquant.core.errors import OptionError
from fxquant.core.facts.expressions import matcher
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


def _glob(pattern: str) -> Callable[[str], bool]:
    return lambda word: fnmatchcase(word, pattern)


FORMS: Mapping[str, tuple[Callable[[str], Callable[[str], bool]], bool]] = {
    "re:": (matcher, False),
    "type:": (_glob, True),
    "": (_glob, False),
}
"""How a pattern begins -> (what makes its test, whether types are tested and not names)."""


def found(pattern: str, names: Sequence[str], types: Types) -> list[str]:
    """Return the names that a pattern matches, none where it matches nothing.

    Args:
        pattern: a glob over names (`layer1.*`), a regular expression for whole names (`re:layer[12]\\..*`), or a glob
            over types (`type:Conv2d`, `type:*Block`, `type:linear`).
        names: the layers' names.
        types: their types.

    Raises:
        OptionError: not a regular expression, or one that could take for ever.
    """
    beginning = next(start for start in FORMS if pattern.startswith(start))
    form, by_type = FORMS[beginning]
    test = form(pattern.removeprefix(beginning))
    return [name for name in names if any(map(test, types.get(name, ()) if by_type else (name,)))]


def matching(pattern: str, names: Sequence[str], types: Types) -> list[str]:
    """Return the names that a pattern matches, at least one.

    Args:
        pattern: as for `found`.
        names: as for `found`.
        types: as for `found`.

    Raises:
        OptionError: it matches nothing, the message lists what is near; or it is not a regular expression.
    """
    matched = found(pattern, names, types)
    if not matched:
        known, wanted = list(names), pattern.removeprefix("re:")
        if pattern.startswith("type:"):
            wanted = pattern.removeprefix("type:")
            # Names with their package say the same at length.
            known = sorted({kind for name in names for kind in types.get(name, ()) if "." not in kind})
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.3) or known[:3]
        raise OptionError(f"pattern {pattern!r} matches no site; near: {', '.join(near)}")
    return matched
