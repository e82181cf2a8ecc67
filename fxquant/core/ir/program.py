"""`Program`: a graph module and the facts known about it, which passes take and return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch.fx import GraphModule

from fxquant.core.errors import PipelineError

F = TypeVar("F")


@dataclass(frozen=True)
class PassRecord:
    """One line of the log: which pass ran with which settings, what it rewrote, how long it took.

    Args:
        name: `repr` of the pass, that is its configuration.
        rewrites: graph rewrites it made.
        seconds: wall time.
    """

    name: str
    rewrites: int
    seconds: float


@dataclass(frozen=True)
class Program:
    """A graph with its facts; passes return a new one and never change an old one.

    Args:
        module: FX graph of ATen ops; parameters are shared between programs and never written to.
        facts: fact type -> fact, for example `program[Ranges]`.
        log: what has been done so far.
    """

    module: GraphModule
    facts: Mapping[type, Any] = field(default_factory=dict)
    log: tuple[PassRecord, ...] = ()

    def __getitem__(self, kind: type[F]) -> F:
        """Return the fact of this type.

        Raises:
            PipelineError: no pass has written it yet.
        """
        if kind not in self.facts:
            known = ", ".join(sorted(k.__name__ for k in self.facts)) or "none"
            raise PipelineError(f"no {kind.__name__} yet; facts present: {known}; run the pass that writes it first")
        fact: F = self.facts[kind]
        return fact

    def __contains__(self, kind: type) -> bool:
        return kind in self.facts

    def without(self, kind: type) -> Program:
        """Return this program without the fact of this type."""
        return Program(self.module, {known: fact for known, fact in self.facts.items() if known is not kind}, self.log)

    def with_facts(self, *facts: object) -> Program:
        """Return this program with the facts added, each under its own type."""
        return Program(self.module, {**self.facts, **{type(fact): fact for fact in facts}}, self.log)
