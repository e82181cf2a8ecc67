"""A table of named plug-ins that refuses duplicates and suggests near names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from fxquant.core.errors import OptionError, PipelineError

T = TypeVar("T")


def unknown(kind: str, name: str, known: Iterable[str]) -> OptionError:
    """Return the error for a name that is not known: it lists the known ones and suggests the nearest."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return OptionError(f"unknown {kind} {name!r}{hint}; known: {', '.join(names)}")


class Registry(Mapping[str, T], Generic[T]):
    """Name -> plug-in of one kind, in the order of registration.

    Args:
        kind: what the entries are called in messages, for example "estimator".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a plug-in under a name and returns it unchanged.

        Raises:
            PipelineError: the name is taken.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                raise PipelineError(f"{self.kind} {name!r} is registered twice; give one of them another name")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """Look a plug-in up.

        Raises:
            OptionError: there is none of that name; the message lists all and the nearest.
        """
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
