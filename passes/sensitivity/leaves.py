"""Gradients in weights and quantized values of the float network, and the power of their rounding noise.

HAWQ and FIT model rounding as isotropic noise: of a tensor with n elements, Hessian (or Fisher matrix) H and shift d,

    d' H d / 2  ~  Tr(H) |d|^2 / (2 n),

so that one trace for each tensor serves every width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxquant.core.facts import FakeQuantNodes
from fxquant.core.ir import Sites, images_axis, tensor_at
from fxquant.core.run import CalibrationSet, Environment
from fxquant.passes.sensitivity.columns import Replacement
from fxquant.passes.sensitivity.scorer import Scorer


class Leaves:
    """A run of the float network, recorded for autograd.

    Args:
        scorer: the network, its columns and its quantizers.
        images: the images to run.
    """

    def __init__(self, scorer: Scorer, images: CalibrationSet) -> None:
        module, nodes, by_name = scorer.program.module, scorer.program[FakeQuantNodes], scorer.replay.by_name
        self.weights: dict[str, Tensor] = {
            site.name: tensor_at(module, site.weight).detach().clone().requires_grad_()
            for site in scorer.program[Sites].sites
        }
        self.shifts: dict[str, Tensor] = {}
        substitution: dict[str, Replacement] = dict(scorer.off)
        for site, names in nodes.weights.items():
            substitution.update({name: _always(self.weights[site]) for name in names})
        substitution.update({name: _shifted(name, self.shifts) for name in rounded_values(scorer)})
        #: answer of the network, differentiable in every leaf, and every value of the run
        self.answer, self.environment = scorer.replay.recorded(images.inputs, substitution)
        #: axis of each quantized value that counts images, None where they do not show
        self.axes = {name: images_axis(by_name[name]) for name in self.shifts}

    @property
    def tensors(self) -> list[Tensor]:
        """The weights of all sites, then the zeros added to each value of `rounded_values`, in that order."""
        return [*self.weights.values(), *self.shifts.values()]

    def gradients(self, scalar: Tensor, keep: bool = False, differentiable: bool = False) -> list[Tensor]:
        """Return the gradient of a scalar with respect to every leaf, 0 for leaves without influence.

        Args:
            scalar: computed from `answer`.
            keep: keep the recorded run for further gradients.
            differentiable: make the gradients differentiable.
        """
        found = torch.autograd.grad(
            scalar, self.tensors, retain_graph=keep or differentiable, create_graph=differentiable, allow_unused=True
        )
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, self.tensors, strict=True)]


def _always(value: Tensor) -> Replacement:
    return lambda _: value


def _shifted(name: str, shifts: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that adds a leaf of zeros to its input and stores the leaf in `shifts`."""

    # The environment holds its substitution: a reference to the `Leaves` here would be a cycle, and every run would
    # stay in memory until the garbage collector runs, gigabytes later.
    def shifted(x: Tensor) -> Tensor:
        shifts[name] = torch.zeros_like(x, requires_grad=True)
        return x + shifts[name]

    return shifted


def rounded_values(scorer: Scorer) -> list[str]:
    """Return the activation fake-quant nodes that some column rounds, in graph order."""
    weights = {name for names in scorer.program[FakeQuantNodes].weights.values() for name in names}
    used = {name for column in scorer.columns for name in column.substitution}
    return [name for name in scorer.replay.by_name if name in used - weights]


def weight_noise(scorer: Scorer) -> NDArray[np.float64]:
    """Return mean dW^2 over the elements of every site's weight, shape (columns, sites)."""
    names, sites = scorer.program[FakeQuantNodes].weights, scorer.program[Sites].sites
    found = np.zeros((len(scorer.columns), len(sites)))
    for row, column in enumerate(scorer.columns):
        for k, site in enumerate(sites):
            node = next((name for name in names[site.name] if name in column.substitution), None)
            if node is not None:
                value = tensor_at(scorer.program.module, site.weight).detach()
                found[row, k] = float((column.substitution[node](value) - value).double().square().mean())
    return found


def activation_noise(scorer: Scorer, environment: Environment, images: int) -> NDArray[np.float64]:
    """Return mean dX^2 over the elements of every rounded value, summed over images, shape (columns, values).

    Args:
        scorer: the columns.
        environment: every value of a float run.
        images: number of images of that run.
    """
    values = rounded_values(scorer)
    found = np.zeros((len(scorer.columns), len(values)))
    with torch.no_grad():
        for row, column in enumerate(scorer.columns):
            for k, name in enumerate(values):
                if name in column.substitution:
                    x = environment[scorer.replay.by_name[name].all_input_nodes[0]].detach()
                    found[row, k] = images * float((column.substitution[name](x) - x).double().square().mean())
    return found
