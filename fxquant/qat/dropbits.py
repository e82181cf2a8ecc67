"""`dropbits`: widths learned by gates that drop bits at random, then the network is trained at the widths found.

CPQ and DropBits, arXiv 2109.02100: `L = loss + lambda sum_l sum_k cost_lk P(width k of l is there)`. The paper tunes
lambda for each network; here it rises while the expected cost is beyond the budget (dual ascent), and at the end the
widths of least log-odds are dropped until the plan keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.optim import Adam

from fxquant.core.facts import BitAllocation, rules
from fxquant.core.ir import Choice, FakeQuantize, Program
from fxquant.passes import simulate
from fxquant.qat.cluster_promoting import NARROWEST, ClusterPromoting
from fxquant.qat.distill import tuned
from fxquant.qat.loop import root_mean_square
from fxquant.qat.narrowing import Ladders
from fxquant.qat.replaced_quantizers import ReplacedQuantizers
from fxquant.qat.trainer import TRAINERS, Trainer, Training, TrainingTask
from fxquant.qat.training_loop import Phase, train


@dataclass(frozen=True)
class DropBitsTraining(Training):
    """How widths are learned; all else as for every training.

    Args:
        share: share of the steps with bits dropped at random, the others train at the widths found.
        penalty: rise of lambda at each step, times what the expected cost is beyond the budget, as a share of it.
        gate_lr: Adam's rate for the log-odds of gates and the spread of the noise.

    Raises:
        OptionError: a value out of range.
    """

    share: float = field(default=0.5, metadata=rules(above=0, below=1))
    penalty: float = field(default=0.1, metadata=rules(least=0))
    gate_lr: float = field(default=5e-2, metadata=rules(above=0))


class _Dropping:
    """The gates of a network, and what they cost."""

    def __init__(self, task: TrainingTask, options: DropBitsTraining) -> None:
        self.task, self.options = task, options
        self.ladders = Ladders.of(task.program, "dropbits")
        self.sites = [site for site, found in self.ladders.rungs.items() if len(found) > 1]
        start = self.ladders.widest
        self.replaced = ReplacedQuantizers(simulate(task.program, BitAllocation(start)), self.sites, self._form)
        self.steps = max(1, round(options.steps * options.share))
        #: site -> what each width adds to the shares of limits that are used, shape (widths,)
        self.costs = {site: self._costs(start, site) for site in self.sites}
        narrow = {site: found[0] for site, found in self.ladders.rungs.items()}
        self.fixed = self.ladders.spent(narrow)
        self.allowed = float(len(self.ladders.limits))
        holder = next(iter(self.forms.values()))
        # In the state of the module, so that a resumed run goes on with it.
        holder.register_buffer("weight_of_cost", torch.tensor(0.0))
        self._holder = holder

    def _form(self, site: str, weight: Tensor, quantizer: FakeQuantize) -> ClusterPromoting:
        options = self.options
        seed = self.task.seed * 1_000_003 + sum(map(ord, site)) * 7919
        rate = options.weight_lr * root_mean_square(weight)
        return ClusterPromoting(weight, quantizer, rate, options.step_lr, options.gate_lr, seed)

    @property
    def forms(self) -> dict[str, ClusterPromoting]:
        return {name: form for name, form in self.replaced.forms.items() if isinstance(form, ClusterPromoting)}

    def _rung(self, site: str, width: int) -> Choice:
        rungs = self.ladders.rungs[site]
        return next((c for c in rungs if c.weight_bits >= width), rungs[-1])

    def _costs(self, start: dict[str, Choice], site: str) -> Tensor:
        form = self.forms[site]
        spent = [self.ladders.spent({**start, site: self._rung(site, width)}) for width in form.widths]
        return torch.tensor([0.0, *(b - a for a, b in pairwise(spent))])

    def beyond(self) -> Tensor:
        """Return by how much the expected cost is beyond the limits, as a share of them; below 0 where it is not."""
        parts = [(self.costs[site] * form.chances_open()).sum() for site, form in self.forms.items()]
        return (torch.stack(parts).sum() + self.fixed) / max(self.allowed, 1.0) - 1.0

    def penalty(self, step: int) -> Tensor:
        """Return `lambda (expected cost / budget - 1)`."""
        del step
        multiplier = self._holder.get_buffer("weight_of_cost")
        return multiplier.clone() * self.beyond()

    def after(self, step: int, optimizer: Adam) -> None:
        """Raise lambda while the expected cost is beyond the budget, lower it while there is room, to 0 at least."""
        del step, optimizer
        multiplier = self._holder.get_buffer("weight_of_cost")
        _ = multiplier.add_(self.options.penalty * self.beyond().detach()).clamp_(min=0.0)

    def choices(self) -> dict[str, Choice]:
        """Return the plan: widths whose gates are more open than not, and those of least log-odds dropped to fit."""
        open_to = {}
        for site, form in self.forms.items():
            shut = [k for k, odds in enumerate(form.odds.tolist()) if odds <= 0]
            open_to[site] = self._rung(site, NARROWEST + (shut[0] if shut else len(form.odds)))
        start = {**self.ladders.widest, **open_to}

        def rank(site: str, narrower: Choice, saved: float) -> float:
            # Odds are against what a width saves already: that is in the penalty they were learned under.
            del saved
            return float(self.forms[site].odds[int(narrower.weight_bits) - NARROWEST].detach())

        return self._widened(self.ladders.narrowed(start, rank))

    def _widened(self, choices: dict[str, Choice]) -> dict[str, Choice]:
        """Return the plan with what room is left given to the widths of most log-odds."""
        found = dict(choices)
        while True:
            fitting: list[tuple[float, str, Choice]] = []
            for site, form in self.forms.items():
                rungs = self.ladders.rungs[site]
                position = rungs.index(found[site]) + 1
                if position < len(rungs) and self.ladders.excess({**found, site: rungs[position]}) == 0:
                    gate = int(rungs[position].weight_bits) - NARROWEST - 1
                    fitting.append((float(form.odds[gate].detach()), site, rungs[position]))
            if not fitting:
                return found
            _, site, wider = max(fitting)
            found[site] = wider


def dropbits(task: TrainingTask) -> Program:
    """Return the task's program with the plan that the gates learned, trained at its widths."""
    options = task.options
    assert isinstance(options, DropBitsTraining)
    dropping = _Dropping(task, options)
    replaced = dropping.replaced
    groups = replaced.groups(options.weight_lr, options.step_lr)
    train(task, replaced.module, Phase("widths", dropping.steps, groups, dropping.penalty, dropping.after))
    choices = dropping.choices()
    found = replaced.gathered(choices)
    return tuned(task.with_widths(choices, "dropbits", *found), options.steps - dropping.steps)


_ = TRAINERS.register("dropbits")(Trainer(dropbits, DropBitsTraining, chooses=True))
