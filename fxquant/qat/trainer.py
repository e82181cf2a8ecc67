"""What trains a plan's network: the table of trainers, their common argument, and their common options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from fxquant.core.errors import CalibrationError, OptionError
from fxquant.core.facts import BitAllocation, CostTables, Options, Rounding, rules, usage
from fxquant.core.host import SILENT, Reporter
from fxquant.core.ir import Choice, Program
from fxquant.core.registry import Registry
from fxquant.core.run import CalibrationSet, Loss
from fxquant.core.storage import ScoreStore
from fxquant.passes import simulate
from fxquant.qat.training_graph import TrainedValues


@dataclass(frozen=True)
class Training(Options):
    """What all trainers take.

    Args:
        steps: steps of the optimizer in all.
        batch: images of a step, drawn at random.
        weight_lr: Adam's rate for weights, biases and norms, relative to the size of each, falling to 0 as a cosine.
            Where it is not given and the held-out loss does not fall, a third is tried.
        step_lr: Adam's rate for the quantizers' steps, relative to each, falling alike.
        moving: whether images are shifted by up to an eighth of their side, and flipped by chance.
        towards: what is trained for: the "loss", or "logits", whose squared error joins it; worth a try at 2 bits, with
            few images that the float network was trained on.

    Raises:
        OptionError: a value out of range.
    """

    KIND: ClassVar[str] = "training option"

    steps: int = field(default=300, metadata=rules(least=1))
    batch: int = field(default=32, metadata=rules(least=1))
    weight_lr: float = field(default=3e-3, metadata=rules(least=0))
    step_lr: float = field(default=1e-3, metadata=rules(least=0))
    moving: bool = True
    towards: Literal["loss", "logits"] = "loss"


@dataclass(frozen=True)
class TrainingTask:
    """One plan of one network that is to be trained.

    Args:
        program: calibrated float program with the plan (`BitAllocation`), and its `Rounding` if there is one.
        images: images to train on, with labels where the loss needs them.
        loss: distance of the answers from the float network's, or from the labels.
        options: of the trainer.
        seed: seed of every random choice.
        store: states of training, from which a killed run resumes.
        reporter: shows progress.
    """

    program: Program
    images: CalibrationSet = field(repr=False)
    loss: Loss
    options: Training
    seed: int = 0
    store: ScoreStore = field(default_factory=lambda: ScoreStore(None, {}), repr=False)
    reporter: Reporter = field(default=SILENT, repr=False)

    @property
    def plan(self) -> BitAllocation:
        """The plan at hand."""
        return self.program[BitAllocation]

    @property
    def simulated(self) -> Program:
        """The simulated graph of the plan, with its rounding."""
        return simulate(self.program, self.plan)

    def with_widths(
        self, choices: Mapping[str, Choice], name: str, found: Rounding, others: TrainedValues
    ) -> TrainingTask:
        """Return the task with a plan that training found, and the values at which its training is to start.

        Args:
            choices: site -> precision, for every site.
            name: of the trainer, which becomes the plan's origin.
            found: weights, biases and grids for these choices.
            others: trained tensors outside of the sites.
        """
        limits = self.plan.limits
        plan = BitAllocation(
            dict(choices),
            estimator=name,
            status="measured",
            used=usage(choices, limits, self.program[CostTables]),
            limits=limits,
            finalists=self.plan.finalists,
        )
        rounding = replace(found, choices=plan.choices)
        values = TrainedValues(plan.choices, others.values)
        return replace(self, program=self.program.with_facts(plan, rounding, values))


@dataclass(frozen=True)
class Trainer:
    """A method that trains.

    Args:
        train: returns the task's program with a trained `Rounding` and `TrainedValues`, and with another plan within
            the same limits where the method chooses widths.
        options: class of its options.
        chooses: whether it chooses the widths of weights.
        separates: whether batch norms that several levels of a network share become one for each level.
    """

    train: Callable[[TrainingTask], Program]
    options: type[Training] = Training
    chooses: bool = False
    separates: bool = False


TRAINERS: Registry[Trainer] = Registry("training")
"""Name -> method that trains."""


def training_options(name: str | None, given: Mapping[str, Any]) -> Training | None:
    """Return the options of a training, None where none is asked for.

    Raises:
        OptionError: there is no training of that name, an unknown option, a value out of range, or options without a
            training.
    """
    if name is None:
        if given:
            raise OptionError(f"training_options {sorted(given)} belong to a training; name one: {', '.join(TRAINERS)}")
        return None
    return TRAINERS[name].options.of(given)


def check_count(images: CalibrationSet, name: str, options: Training) -> None:
    """Fail if there are too few images to train on.

    Raises:
        CalibrationError: fewer than a batch.
    """
    if len(images) < options.batch:
        raise CalibrationError(
            f"training {name!r} takes batches of {options.batch} images, and {len(images)} are left to train on beside "
            f"the held-out ones; give more, or training_options={{'batch': {len(images)}}}"
        )
