"""Widths that sites may take, and narrowing them one step at a time until a plan keeps its limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fxquant.core.errors import InfeasibleBudgetError, OptionError
from fxquant.core.facts import BitAllocation, Budget, CostTables, usage
from fxquant.core.ir import Choice, Program, Sites

UNCOUNTED = "latency"
"""What limits begin with that are measured on whole plans, and cannot be counted while widths change."""

Rank = Callable[[str, Choice, float], float]
"""(site, its narrower choice, what that saves as a share of the limits) -> how much is against taking it."""


@dataclass(frozen=True)
class Ladders:
    """The evenly spaced widths of every site, activations as in the plan at hand.

    Args:
        rungs: site -> choices by ascending width; the plan's own alone where its format is not evenly spaced.
        tables: of costs.
        limits: limit name -> what is allowed.
    """

    rungs: Mapping[str, tuple[Choice, ...]]
    tables: CostTables
    limits: Mapping[str, float]

    @staticmethod
    def of(program: Program, name: str) -> Ladders:
        """Return the ladders of a program with a plan.

        Args:
            program: with costs and the plan.
            name: of the trainer that asks, for messages.

        Raises:
            OptionError: a limit of milliseconds, or no site that has two widths.
        """
        plan, rungs = program[BitAllocation], dict[str, tuple[Choice, ...]]()
        for site in program[Sites].sites:
            chosen = plan.choices[site.name]
            found = [c for c in site.choices if c.kind == "uniform" and not c.is_float]
            found = [c for c in found if c.activation_bits == chosen.activation_bits]
            rungs[site.name] = (chosen,) if chosen.is_float or not found else tuple(sorted(found))
        timed = [limit for limit in plan.limits if limit.startswith(UNCOUNTED)]
        if timed:
            raise OptionError(f"training {name!r} chooses widths by costs that are counted; {timed[0]} is measured")
        if all(len(found) == 1 for found in rungs.values()):
            raise OptionError(f"training {name!r} chooses among evenly spaced widths; give two or more (bits=)")
        return Ladders(rungs, program[CostTables], plan.limits)

    @property
    def widest(self) -> dict[str, Choice]:
        """Every site at its widest."""
        return {site: found[-1] for site, found in self.rungs.items()}

    def below(self, site: str, choice: Choice) -> Choice | None:
        """Return the next narrower choice of a site, None at the narrowest."""
        position = self.rungs[site].index(choice)
        return self.rungs[site][position - 1] if position else None

    def excess(self, choices: Mapping[str, Choice], slack: float = 0.0) -> float:
        """Return by how much a plan is beyond its limits, the sum of shares of each; 0 where it keeps them.

        Args:
            choices: of every site.
            slack: share of each limit that may be used beyond it.
        """
        used = usage(choices, self.limits, self.tables)
        return sum(max(0.0, used[name] / limit - 1 - slack - 1e-9) for name, limit in self.limits.items())

    def spent(self, choices: Mapping[str, Choice]) -> float:
        """Return what a plan uses of its limits, as the sum of shares of each."""
        used = usage(choices, self.limits, self.tables)
        return sum(used[name] / limit for name, limit in self.limits.items())

    def saved(self, choices: Mapping[str, Choice], site: str, narrower: Choice) -> float:
        """Return what a plan would use less of its limits with a narrower site."""
        return self.spent(choices) - self.spent({**choices, site: narrower})

    def cheapest(self, choices: Mapping[str, Choice], rank: Rank) -> str:
        """Return the site that is to be made narrower: that of the lowest rank among those that save anything.

        Args:
            choices: of every site.
            rank: of a step.

        Raises:
            InfeasibleBudgetError: there is none.
        """
        found: list[tuple[float, str]] = []
        for site, choice in choices.items():
            narrower = self.below(site, choice)
            saved = 0.0 if narrower is None else self.saved(choices, site, narrower)
            if narrower is not None and saved > 0:
                found.append((rank(site, narrower, saved), site))
        if not found:
            raise InfeasibleBudgetError(
                f"no plan of evenly spaced widths keeps {Budget.of(self.limits)}; raise the limit or allow narrower "
                "bits"
            )
        return min(found)[1]

    def narrowed(self, choices: Mapping[str, Choice], rank: Rank, slack: float = 0.0) -> dict[str, Choice]:
        """Return the plan with one site after the other made narrower until it keeps its limits.

        Args:
            choices: of every site.
            rank: of a step; the lowest goes first.
            slack: as for `excess`.

        Raises:
            InfeasibleBudgetError: there is no such plan.
        """
        found = dict(choices)
        while self.excess(found, slack) > 0:
            site = self.cheapest(found, rank)
            narrower = self.below(site, found[site])
            assert narrower is not None
            found[site] = narrower
        return found
