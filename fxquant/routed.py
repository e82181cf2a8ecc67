"""`Routed`: a network that runs one of two plans for each patch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from fxquant.backends.onnx import write_routed
from fxquant.core.errors import OptionError
from fxquant.core.facts import EASY, HARD, BitAllocation, RouteFit, Routes
from fxquant.core.ir import Program
from fxquant.core.run import PatchRouter
from fxquant.passes import simulate

if TYPE_CHECKING:
    from fxquant.backends.onnx import ExportReport, OnnxOptions

ROUTED_FILE = "model.routed.onnx"
"""Name of its ONNX file in the folder of a result."""


class RoutedGraphs(nn.Module):
    """Runs each image of a batch through one of two graphs, and returns the answers in the order of the images."""

    def __init__(self, hard: nn.Module, easy: nn.Module, router: PatchRouter) -> None:
        super().__init__()
        self.hard, self.easy, self.router = hard, easy, router

    def forward(self, images: Tensor) -> Any:
        """Return what the graphs return for images (N, C, H, W)."""
        chosen = self.router.hard(images)
        if bool(chosen.all()) or not bool(chosen.any()):
            return (self.hard if bool(chosen.all()) else self.easy)(images)
        order = torch.cat([chosen.nonzero(), (~chosen).nonzero()]).flatten().argsort()

        def joined(hard: Tensor, easy: Tensor) -> Tensor:
            return torch.cat([hard, easy])[order]

        return tree_map(joined, self.hard(images[chosen]), self.easy(images[~chosen]))


@dataclass(frozen=True)
class Routed:
    """Two plans of one network and a router: what `Result.routed` is where the settings ask for routes.

    Args:
        routes: the plans and what the router was fitted to.
    """

    routes: Routes = field(repr=False)

    @property
    def fit(self) -> RouteFit:
        """The threshold, and what it was fitted to."""
        return self.routes.fit

    @property
    def router(self) -> PatchRouter:
        """Which patches are hard."""
        return PatchRouter(self.fit.threshold)

    @property
    def plans(self) -> Mapping[str, BitAllocation]:
        """`"hard"` and `"easy"` -> plan."""
        return {name: program[BitAllocation] for name, program in self.routes.plans.items()}

    @cached_property
    def graphs(self) -> Mapping[str, GraphModule]:
        """`"hard"` and `"easy"` -> simulated graph."""
        return {name: simulate(each, each[BitAllocation]).module for name, each in self.routes.plans.items()}

    @cached_property
    def simulated(self) -> RoutedGraphs:
        """The network that routes, in simulation: takes any number of images, each its own way."""
        return RoutedGraphs(self.graphs[HARD], self.graphs[EASY], self.router)

    def to_onnx(self, path: str | Path, options: OnnxOptions | None = None) -> ExportReport:
        """Write one ONNX file that takes one patch at a time: the router and, behind `If`, both plans.

        Weights that both plans store alike are in the file once.

        Raises:
            OptionError: the options name a layer that cannot have what they ask for.
            OutputError: the path cannot be written.
            LoweringError: an op has no ONNX form, or the model has not one input (N, C, H, W).
            MissingDependencyError: the onnx extra is not installed.
        """
        texts = {f"{name}_{key}": text for name, plan in self.plans.items() for key, text in plan.texts.items()}
        return write_routed(self.graphs[HARD], self.graphs[EASY], self.fit.threshold, Path(path), texts, options)

    def summary(self) -> str:
        """Return what routes where, and what it costs and loses, as lines of text."""
        fit = self.fit
        costs = [f"mean {name} {fit.used[name]:.4g} of {limit:.4g}" for name, limit in fit.limits.items()]
        change = "less" if fit.loss < fit.static_loss else "not less"
        return "\n".join(
            [
                f"Routed: {100 * fit.share:.0f} % of {fit.patches} patches, those of gradient magnitude above "
                f"{fit.threshold:.4g}, run the plan for hard ones; {', '.join(costs)}",
                f"Mean loss {fit.loss:.4g}, {change} than {fit.static_loss:.4g} of one plan within the same limits; "
                "both on the calibration images, before the last rounding",
            ]
        )


def routed_of(program: Program) -> Routed:
    """Return the routed network of a program.

    Raises:
        OptionError: no routes were asked for, or no plan was chosen yet.
    """
    if Routes not in program:
        raise OptionError("this result has one plan; quantize with recipe='dynamic' or routed=True, and a budget")
    return Routed(program[Routes])
