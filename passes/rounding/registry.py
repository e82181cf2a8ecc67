"""The table of rounding algorithms, and their common argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from fxquant.core.facts import BitAllocation, Rounding
from fxquant.core.host import SILENT, Reporter
from fxquant.core.ir import Choice, Program, Site, Sites
from fxquant.core.registry import Registry
from fxquant.core.run import CalibrationSet, Loss
from fxquant.core.storage import ScoreStore
from fxquant.passes.simulation import simulate


@dataclass(frozen=True)
class RoundingTask:
    """One plan of one network, whose weights are to be rounded.

    Args:
        program: calibrated float program with the plan (`BitAllocation`), and the `Rounding` of an earlier algorithm.
        images: calibration images to tune on.
        held_out: images that decide whether a rounding is accepted; None accepts everything.
        loss: the loss, or its name.
        seed: seed of every random choice.
        store: finished units, from which a killed run resumes.
        corrections: corrected inputs; they depend on the float network and the images alone, and serve all plans.
        overrides: settings of the reconstruction engine -> value, which replaces the algorithm's own.
        reporter: shows progress.
        judging: makes the images that plans are measured on: with the held-out ones they decide whether a rounding of
            the whole network is accepted; None leaves that to the held-out ones.
    """

    program: Program
    images: CalibrationSet = field(repr=False)
    held_out: CalibrationSet | None = field(repr=False)
    loss: str | Loss = "kl"
    seed: int = 0
    store: ScoreStore = field(default_factory=lambda: ScoreStore(None, {}), repr=False)
    corrections: ScoreStore = field(default_factory=lambda: ScoreStore(None, {}), repr=False)
    overrides: Mapping[str, object] = field(default_factory=dict)
    reporter: Reporter = field(default=SILENT, repr=False)
    judging: Callable[[], CalibrationSet] | None = field(default=None, repr=False)

    @property
    def choices(self) -> dict[str, Choice]:
        """The plan's precision of every site."""
        return self.program[BitAllocation].choices

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that the plan runs on integers; weights that are only stored are rounded to nearest."""
        found = self.program[Sites].sites
        return tuple(site for site in found if not site.stored and not self.choices[site.name].is_float)

    @property
    def rounding(self) -> Rounding:
        """The rounding that earlier algorithms chose for this plan, an empty one if none did."""
        return Rounding.of(self.program, self.choices)

    def simulated(self, rounding: Rounding | None = None) -> Program:
        """Return the simulated program with a rounding, by default that of earlier algorithms."""
        chosen = self.rounding if rounding is None else rounding
        return simulate(self.program.with_facts(chosen), self.program[BitAllocation])

    def bare(self) -> Program:
        """Return the simulated program without rounded weights: its quantizers off, it is exactly the float network."""
        return simulate(self.program, self.program[BitAllocation], round_biases=False)

    def done(self, rounding: Rounding, method: str, program: Program | None = None) -> Program:
        """Return the program with this rounding, its name appended to those of earlier algorithms."""
        names = [name for name in (self.rounding.method, method) if name != "nearest"]
        named = replace(rounding, method="+".join(names) or "nearest")
        return (self.program if program is None else program).with_facts(named)


Rounder = Callable[[RoundingTask], Program]
"""Returns the task's program with a new `Rounding`."""

ROUNDERS: Registry[Rounder] = Registry("rounding")
"""Name -> algorithm with its published settings."""
