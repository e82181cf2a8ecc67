"""The quantizers of a unit: modules that learn while it is tuned, tensors once it is decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.core.facts import FakeQuantNodes
from fxquant.core.ir import FakeQuantize, Grid, Site, tensor_at
from fxquant.core.storage import Arrays
from fxquant.passes.rounding.learned.options import Reconstruction
from fxquant.passes.rounding.learned.quantizers import LearnedActivation, SoftRounding, StraightThrough
from fxquant.passes.rounding.learned.units import Unit


class DecidedWeight(nn.Module):
    """Returns a decided weight.

    Args:
        value: float32 on its grid.
    """

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the decided weight in place of the one passed."""
        del weight
        return self.value


@dataclass(frozen=True)
class Outcome:
    """Decided tensors.

    Args:
        weights: site name -> weight on its grid.
        scales: site name -> learned scale of that grid, shape (channels,).
        steps: group name -> learned scale of its values, shape ().
        levels: site name -> learned levels of its grid, int8 of shape (channels, L), where they are not evenly spaced.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, Tensor] = field(default_factory=dict)
    levels: dict[str, Tensor] = field(default_factory=dict)

    def joined(self, other: Outcome) -> Outcome:
        """Return both merged; `other` wins."""
        return Outcome(*(getattr(self, kind) | getattr(other, kind) for kind in KINDS))

    @property
    def finite(self) -> bool:
        """Whether every number is finite and every scale above 0."""
        tensors = [*self.weights.values(), *self.scales.values(), *self.steps.values()]
        positive = all(bool((t > 0).all()) for t in (*self.scales.values(), *self.steps.values()))
        return positive and all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

    def arrays(self) -> Arrays:
        """Return the tensors as named arrays."""
        kinds = {kind: getattr(self, kind) for kind in KINDS}
        return {f"{k}:{name}": t.detach().cpu().numpy() for k, held in kinds.items() for name, t in held.items()}

    @staticmethod
    def from_arrays(arrays: Arrays, device: torch.device) -> Outcome:
        """Read what `arrays` returned; arrays of other names are ignored."""
        held: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        for key, array in arrays.items():
            kind, colon, name = key.partition(":")
            if colon and kind in held:
                held[kind][name] = torch.from_numpy(np.array(array)).to(device)
        return Outcome(**held)


KINDS = tuple(each.name for each in fields(Outcome))


class UnitQuantizers:
    """The quantizers of a simulated graph, and the modules that replace them.

    Args:
        module: bare simulated graph.
        nodes: its quantizers.
        sites: those it quantizes.
        earlier: site name -> weight that an earlier algorithm chose, in place of nearest rounding.
    """

    def __init__(
        self,
        module: GraphModule,
        nodes: FakeQuantNodes,
        sites: tuple[Site, ...],
        earlier: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.module, self.nodes = module, nodes
        self._weight_of = {site.name: tensor_at(module, site.weight).detach() for site in sites}
        self._start_of = {**self._weight_of, **(earlier or {})}
        self._paths = {node.name: str(node.target) for node in module.graph.nodes if node.op == "call_module"}
        self._group_of = {name: group for group, names in nodes.activations.items() for name in names}

    def learned(
        self, unit: Unit, decided: Outcome, options: Reconstruction, generator: torch.Generator
    ) -> dict[str, nn.Module]:
        """Return site or group name -> module that learns, for weights and steps that no earlier unit decided.

        The first of several units that share a scale or weight learns it. Straight-through weights start at those of an
        earlier algorithm; rounding directions start at the float weight, since on the grid none would be open.
        """
        made: dict[str, nn.Module] = {}
        for site in unit.sites:
            if site in decided.weights:
                continue
            quantizer = self._quantizer(self.nodes.weights[site][0])
            if options.learned == "rounding":
                made[site] = SoftRounding(self._weight_of[site], quantizer)
            else:
                made[site] = StraightThrough(self._start_of[site], quantizer)
        for group in self._groups(unit):
            if group not in decided.steps:
                quantizer = self._quantizer(self.nodes.activations[group][0])
                made[_key(group)] = LearnedActivation(quantizer, options.step_lr > 0, options.drop, generator)
        return made

    def has_open(self, unit: Unit, decided: Outcome, options: Reconstruction) -> bool:
        """Whether anything of a unit is left to learn."""
        weights = any(site not in decided.weights for site in unit.sites)
        return weights or (options.step_lr > 0 and any(group not in decided.steps for group in self._groups(unit)))

    def decided(self, unit: Unit, learned: Mapping[str, nn.Module]) -> Outcome:
        """Return the tensors that the modules have learned; steps that were not learned are those of calibration."""
        outcome = Outcome()
        for name, module in learned.items():
            if isinstance(module, SoftRounding | StraightThrough):
                outcome.weights[name] = module.hard().detach()
            if isinstance(module, StraightThrough):
                outcome.scales[name] = module.steps().detach()
                if (levels := module.whole_levels()) is not None:
                    outcome.levels[name] = levels
        for group in self._groups(unit):
            activation = learned.get(_key(group))
            if isinstance(activation, LearnedActivation):
                outcome.steps[group] = activation.steps().detach()
        return outcome

    def as_calibrated(self, unit: Unit, decided: Outcome) -> Outcome:
        """Return nearest rounding, or an earlier algorithm's, and calibrated steps where no earlier unit decided."""
        weights = {s: self._nearest(s) for s in unit.sites if s not in decided.weights}
        groups = [group for group in self._groups(unit) if group not in decided.steps]
        return Outcome(weights, {}, {g: self._quantizer(self.nodes.activations[g][0]).scale for g in groups})

    def in_place(self, learned: Mapping[str, nn.Module], decided: Outcome) -> dict[str, nn.Module]:
        """Return quantizer node name -> the module that learns it, else its decided value."""
        places: dict[str, nn.Module] = {}
        for site, names in self.nodes.weights.items():
            if site in learned or site in decided.weights:
                places |= dict.fromkeys(names, learned.get(site) or DecidedWeight(decided.weights[site]))
        for group, names in self.nodes.activations.items():
            if _key(group) in learned:
                places |= dict.fromkeys(names, learned[_key(group)])
            elif group in decided.steps:
                places |= dict.fromkeys(names, FakeQuantize(self.with_step(group, decided.steps[group])))
        return places

    def with_step(self, group: str, scale: Tensor) -> Grid:
        """Return the grid of a group's values with another scale."""
        return replace(self._quantizer(self.nodes.activations[group][0]).grid, scale=scale)

    def _groups(self, unit: Unit) -> list[str]:
        return list(dict.fromkeys(self._group_of[name] for name in unit.nodes if name in self._group_of))

    def _nearest(self, site: str) -> Tensor:
        with torch.no_grad():
            rounded: Tensor = self._quantizer(self.nodes.weights[site][0])(self._start_of[site])
        return rounded

    def _quantizer(self, name: str) -> FakeQuantize:
        found = self.module.get_submodule(self._paths[name])
        assert isinstance(found, FakeQuantize)
        return found


def _key(group: str) -> str:
    """Return the key of a group among learned modules; sites are keyed by their own names."""
    return f"values of {group}"
