"""A training graph whose weight quantizers are replaced by modules that hold the weights in another form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.core.facts import FakeQuantNodes, Rounding, Target
from fxquant.core.ir import Choice, FakeQuantize, Grid, Program, Sites, put_tensor, resolve, tensor_at
from fxquant.passes import channel_axes
from fxquant.qat.loop import parameter_groups
from fxquant.qat.training_graph import TrainedValues, gather, trainable


class WeightForm(nn.Module, ABC):
    """A weight in another form; called as its quantizer is, it returns the quantized weight whatever it is given."""

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """Return its parameter groups for an optimizer."""

    @abstractmethod
    def weight(self) -> Tensor:
        """Return the weight at the end, before rounding, without gradient."""


class ReplacedQuantizers:
    """The training graph of a plan with a `WeightForm` in the place of the quantizer of each weight of some sites.

    Args:
        simulated: the graph of the plan.
        sites: whose weights take another form.
        form: (site, weight, quantizer) -> the form.
    """

    def __init__(
        self, simulated: Program, sites: list[str], form: Callable[[str, Tensor, FakeQuantize], WeightForm]
    ) -> None:
        self._simulated, self.module = simulated, trainable(simulated)
        #: site -> form of its weight
        self.forms: dict[str, WeightForm] = {}
        self._own: dict[str, nn.Module] = {}
        for name in sites:
            paths = self._paths(name)
            quantizer = self.module.get_submodule(paths[0])
            assert isinstance(quantizer, FakeQuantize)
            weight = tensor_at(self.module, simulated[Sites].by_name(name).weight).detach()
            self.forms[name] = form(name, weight, quantizer)
            for path in paths:
                self._own[path] = self.module.get_submodule(path)
                self.module.set_submodule(path, self.forms[name])

    def groups(self, weight_lr: float, step_lr: float) -> list[dict[str, Any]]:
        """Return the groups of `parameter_groups` for all but the replaced weights, and those of the forms."""
        held = {id(p) for form in self.forms.values() for p in form.parameters()}
        held |= {id(tensor_at(self.module, self._simulated[Sites].by_name(name).weight)) for name in self.forms}
        others = parameter_groups(self.module, weight_lr, step_lr)
        kept = [{**group, "params": [p for p in group["params"] if id(p) not in held]} for group in others]
        own = [group for form in self.forms.values() for group in form.groups()]
        return [group for group in (*kept, *own) if group["params"]]

    def gathered(self, choices: dict[str, Choice]) -> tuple[Rounding, TrainedValues]:
        """Return what was trained, as the values at which the training of a plan begins.

        Args:
            choices: the plan; weights get the grids of least squared error at its widths.
        """
        module: GraphModule = self.module
        per_channel, axes = self._simulated[Target].per_channel, channel_axes(self._simulated)
        grids: dict[str, Grid] = {}
        with torch.no_grad():
            for name, form in self.forms.items():
                weight = form.weight()
                put_tensor(module, self._simulated[Sites].by_name(name).weight, weight)
                grids[name] = Grid.of_weight(weight, int(choices[name].weight_bits), axes[name], per_channel)
        for path, quantizer in self._own.items():
            module.set_submodule(path, quantizer)
        rounding, values = gather(self._simulated, module)
        return replace(rounding, choices=choices, grids={**rounding.grids, **grids}), values

    def _paths(self, site: str) -> list[str]:
        names = self._simulated[FakeQuantNodes].weights[site]
        return [str(resolve(self.module.graph, name).target) for name in names]
