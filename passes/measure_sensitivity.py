"""Measure how precision at each site, and each pair of sites, hurts the prediction."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxquant.core.facts import BitAllocation, FakeQuantNodes, Ranges, SensitivityMatrix, Surrogates, WeightGrids
from fxquant.core.host import ALONE, SILENT, Reporter, Shards, give_back, seconds_text
from fxquant.core.ir import EdgeGroups, Program, Sites
from fxquant.core.run import CalibrationSet, Loss, loss_of
from fxquant.core.storage import ScoreStore
from fxquant.passes.base import Pass
from fxquant.passes.sensitivity import ESTIMATORS, Scorer, expected_seconds


@dataclass(frozen=True)
class MeasureSensitivity(Pass):
    """Write `SensitivityMatrix` and `Surrogates`; runs on a simulated graph, whatever its plan.

    Args:
        images: the images to score on.
        estimators: names, the preferred one first.
        loss: the loss, or its name.
        store: finished cells of an earlier run; None keeps none.
        reporter: shows progress, and the memory needed before the work starts.
        seed: seed of sampled labels and probes.
        shards: this process among those that share the work.
        context: the plan that everything else is quantized by; None leaves everything else in float.

    Raises:
        OptionError: an unknown estimator or loss.
        WorkerError: another process that shares the work was lost.
    """

    images: CalibrationSet = field(repr=False)
    estimators: tuple[str, ...] = ("gram",)
    loss: str | Loss = "kl"
    store: ScoreStore | None = field(default=None, repr=False)
    reporter: Reporter = field(default=SILENT, repr=False)
    seed: int = 0
    shards: Shards = ALONE
    context: BitAllocation | None = None
    reads = (Sites, EdgeGroups, Ranges, WeightGrids, FakeQuantNodes)
    writes = (SensitivityMatrix, Surrogates)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its sensitivity."""
        estimators = {name: ESTIMATORS[name] for name in self.estimators}
        loss = loss_of(self.loss)
        store = self.store if self.store is not None else ScoreStore(None, {})
        scorer = Scorer(
            program, self.images, loss, store, self.reporter, self.context, seed=self.seed, shards=self.shards
        )
        self.reporter.say(
            f"{len(scorer.candidates)} candidates, {len(scorer.columns)} perturbations to measure on "
            f"{len(self.images)} images with {', '.join(estimators)}; {scorer.memory.text()}"
        )
        seconds = expected_seconds(scorer, estimators.values()) if self.shards.world_size == 1 else None
        if seconds is not None:
            self.reporter.say(f"scoring takes about {seconds_text(seconds)}")
        matrices: dict[str, SensitivityMatrix] = {}
        for name, estimate in estimators.items():
            matrices[name] = estimate(scorer)
            give_back()
        return program.with_facts(matrices[self.estimators[0]], Surrogates(matrices)), 0
