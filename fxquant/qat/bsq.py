"""`bsq`: bits shrink to a budget under a penalty on bit planes, then the network is trained at the widths found.

BSQ, arXiv 2102.10462: `L = loss + alpha sum_l (size_l bits_l / size) sum_b |plane_b of l|`. From time to time planes
become whole bits again, and those that are all zero are dropped. The paper trains for hundreds of epochs and takes
whatever bits are left; here a few hundred steps meet a budget: at each re-quantization the plan must keep a limit that
falls to the budget, and what zeros do not save, the planes give of the least expected loss for what they save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Adam

from fxquant.core.facts import BitAllocation, rules
from fxquant.core.ir import Choice, FakeQuantize, Program
from fxquant.core.run import answer_graph, first_tensor
from fxquant.passes import simulate
from fxquant.qat.bit_planes import BitPlanes
from fxquant.qat.distill import tuned
from fxquant.qat.loop import root_mean_square
from fxquant.qat.narrowing import Ladders, Rank
from fxquant.qat.replaced_quantizers import ReplacedQuantizers
from fxquant.qat.trainer import TRAINERS, Trainer, Training, TrainingTask
from fxquant.qat.training_loop import STREAM, Phase, drawn, train

SAMPLES = 4
"""Batches from which the curvature at a re-quantization is estimated."""


@dataclass(frozen=True)
class BitPlaneTraining(Training):
    """How bit planes are trained; all else as for every training.

    Args:
        share: share of the steps that train bit planes, the others train at the widths found.
        weight_lr: as for every training; higher, for the widths found leave weights far from what they should be.
        plane_lr: Adam's rate for weights, in planes, and all else in those steps; lower, for they start at the float
            network, where the loss has no slope but noise.
        penalty: alpha: by how much the lowest plane of a layer of mean size shrinks between two re-quantizations.
        requantizations: times that planes become whole bits again and are dropped, evenly spread.

    Raises:
        OptionError: a value out of range.
    """

    share: float = field(default=0.5, metadata=rules(above=0, below=1))
    weight_lr: float = field(default=1e-2, metadata=rules(least=0))
    plane_lr: float = field(default=2e-3, metadata=rules(least=0))
    penalty: float = field(default=0.1, metadata=rules(least=0))
    requantizations: int = field(default=6, metadata=rules(least=1))


class _Shrinking:
    """The bit planes of a network on their way to a budget."""

    def __init__(self, task: TrainingTask, options: BitPlaneTraining) -> None:
        self.task, self.options = task, options
        self.ladders = Ladders.of(task.program, "bsq")
        self.sites = [site for site, found in self.ladders.rungs.items() if len(found) > 1]
        start = BitAllocation(self.ladders.widest)
        self.replaced = ReplacedQuantizers(simulate(task.program, start), self.sites, self._planes)
        self.steps = max(1, round(options.steps * options.share))
        self.every = max(1, self.steps // options.requantizations)
        self.excess = self.ladders.excess(start.choices)
        self._aim(self._slopes(-1), (1.0 - 1.0 / options.requantizations) * self.excess)

    def _planes(self, site: str, weight: Tensor, quantizer: FakeQuantize) -> BitPlanes:
        del site
        return BitPlanes(weight, quantizer, self.options.plane_lr * root_mean_square(weight), self.options.step_lr)

    @property
    def forms(self) -> dict[str, BitPlanes]:
        return {name: form for name, form in self.replaced.forms.items() if isinstance(form, BitPlanes)}

    def choices(self) -> dict[str, Choice]:
        """Return the plan of the planes that are left: the narrowest rung that holds them."""
        found = self.ladders.widest
        for name, form in self.forms.items():
            rungs = self.ladders.rungs[name]
            found[name] = next((c for c in rungs if c.weight_bits >= form.width), rungs[-1])
        return found

    def amount(self, name: str) -> float:
        """Return by how much the lowest plane of a site shrinks at a step: alpha times its share of all bits (eq. 5).

        Shares are against the mean, so that one alpha does for networks of few and of many layers.
        """
        bits = {site: form.planes[0].numel() * form.width for site, form in self.forms.items()}
        share = bits[name] * len(bits) / sum(bits.values())
        return self.options.penalty * share / self.every

    def after(self, step: int, optimizer: Adam) -> None:
        """Shrink the planes; at a re-quantization, make them whole and drop what must go."""
        amounts = {name: self.amount(name) for name in self.forms}
        for name, form in self.forms.items():
            form.shrink(amounts[name])
        turns = self.options.requantizations
        turn, last = (step + 1) // self.every, step + 1 == self.steps
        if not last and ((step + 1) % self.every or turn >= turns):
            return
        slopes = self._slopes(step)
        for form in self.forms.values():
            form.requantize()
        self._drop(slopes, 0.0 if last else (1.0 - turn / turns) * self.excess)
        self._aim(slopes, max(0.0, 1.0 - (turn + 1) / turns) * self.excess)
        for form in self.forms.values():
            # What Adam knew of the old bits says nothing of the new ones.
            for moment in optimizer.state[form.planes].values():
                _ = moment.zero_()

    def _slopes(self, step: int) -> dict[str, Tensor]:
        """Return the diagonal of the Fisher matrix of each weight, of its shape.

        Derivatives of the answer along vectors v with `E[v v'] = ` Hessian of the loss, so that those of a batch add up
        to the sum of their squares; where nothing is known of the curvature, of the loss itself.
        """
        graph, teacher = answer_graph(self.replaced.module), answer_graph(self.task.program.module)
        found = {name: torch.zeros(form.planes.shape[1:]) for name, form in self.forms.items()}
        for turn in range(SAMPLES):
            batch = drawn(self.task, f"curvature {turn}", step)
            answer = first_tensor(graph(*batch.inputs))
            with torch.no_grad():
                reference = first_tensor(teacher(*batch.inputs))
            if self.task.loss.curved:
                first = step * STREAM + turn * len(batch)
                draws = [torch.Generator().manual_seed(first + k) for k in range(len(batch))]
                along = self.task.loss.sample(answer.detach(), reference, draws)
            else:
                value = self.task.loss(reference, answer, batch.labels).sum()
                (along,) = torch.autograd.grad(value, answer, retain_graph=True)
            slopes = torch.autograd.grad(answer, [form.planes for form in self.forms.values()], along.to(answer.dtype))
            for (name, form), slope in zip(self.forms.items(), slopes, strict=True):
                found[name] += (slope[0] / form.along(form.step.detach())).square()
        return found

    def _drop(self, slopes: Mapping[str, Tensor], slack: float) -> None:
        """Drop planes until the plan is within the limits and a slack."""

        while self.ladders.excess(self.choices(), slack) > 0:
            self.forms[self.ladders.cheapest(self.choices(), self._rank(slopes))].requantize(narrower=True)

    def _aim(self, slopes: Mapping[str, Tensor], slack: float) -> None:
        """Choose whose planes the penalty shrinks until the next re-quantization: those that will have to go."""
        aims = self.ladders.narrowed(self.choices(), self._rank(slopes), slack)
        for name, form in self.forms.items():
            _ = form.wanted.fill_(int(aims[name].weight_bits))

    def _rank(self, slopes: Mapping[str, Tensor]) -> Rank:
        """Return how much loss is to be expected of narrower sites, `sum F dw^2 / 2`, for what they save."""
        losses = {
            name: float((form.error_narrower().square() * slopes[name]).sum()) for name, form in self.forms.items()
        }

        def rank(site: str, narrower: Choice, saved: float) -> float:
            # Each further plane is twice as coarse.
            further = max(0, self.forms[site].width - int(narrower.weight_bits) - 1)
            return losses[site] * 4.0**further / saved

        return rank


def bsq(task: TrainingTask) -> Program:
    """Return the task's program with the plan that bit planes shrank to, trained at its widths."""
    options = task.options
    assert isinstance(options, BitPlaneTraining)
    shrinking = _Shrinking(task, options)
    replaced = shrinking.replaced
    groups = replaced.groups(options.plane_lr, options.step_lr)
    train(task, replaced.module, Phase("planes", shrinking.steps, groups, after=shrinking.after))
    choices = shrinking.choices()
    found = replaced.gathered(choices)
    return tuned(task.with_widths(choices, "bsq", *found), options.steps - shrinking.steps)


_ = TRAINERS.register("bsq")(Trainer(bsq, BitPlaneTraining, chooses=True))
