"""The quantizers of a unit: modules that learn while it is tuned, tensors once it is decided."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.core.facts import FakeQuantNodes
from fxquant.core.ir import FakeQuantize, Grid, Site, resolve, tensor_at
from fxquant.core.run import cut_span
from fxquant.passes.rounding.learned.activation_starts import activation_starts
from fxquant.passes.rounding.learned.options import Reconstruction
from fxquant.passes.rounding.learned.outcome import DecidedBias, DecidedWeight, Outcome
from fxquant.passes.rounding.learned.quantizers import LearnedActivation, SoftRounding, StraightThrough
from fxquant.passes.rounding.learned.units import Unit


@dataclass(frozen=True)
class Chosen:
    """What an earlier algorithm chose, from which learning starts.

    Args:
        weights: site name -> weight in place of nearest rounding.
        biases: op name -> bias in place of the model's own.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)


class UnitQuantizers:
    """The quantizers of a simulated graph and the biases of its ops, and the modules that replace them.

    Args:
        module: bare simulated graph.
        nodes: its quantizers.
        sites: those it quantizes.
        chosen: by an earlier algorithm.
    """

    def __init__(
        self, module: GraphModule, nodes: FakeQuantNodes, sites: tuple[Site, ...], chosen: Chosen | None = None
    ) -> None:
        self.module, self.nodes, self.chosen = module, nodes, chosen or Chosen()
        self._weight_of = {site.name: tensor_at(module, site.weight).detach() for site in sites}
        self._start_of = {**self._weight_of, **self.chosen.weights}
        self._paths = {node.name: str(node.target) for node in module.graph.nodes if node.op == "call_module"}
        self._group_of = {name: group for group, names in nodes.activations.items() for name in names}
        self._ops = {site.name: site.nodes for site in sites}

    def learned(
        self,
        unit: Unit,
        decided: Outcome,
        options: Reconstruction,
        generator: torch.Generator,
        starts: Mapping[str, Grid] | None = None,
    ) -> dict[str, nn.Module]:
        """Return site or group name -> module that learns, for weights and steps that no earlier unit decided.

        The first of several units that share a scale or weight learns it. Straight-through weights start at those of an
        earlier algorithm, rounding directions near them. Biases are the model's own: an earlier algorithm's make up for
        the errors of its weights, and do harm with others (ResNet-8 at W2A2 behind Qronos: held-out KL 2.9 with them,
        1.4 without).

        Args:
            unit: the unit.
            decided: of earlier units.
            options: which parts are learned.
            generator: draws the elements that stay unrounded.
            starts: group name -> grid that its values start from in place of the calibrated one.
        """
        made: dict[str, nn.Module] = {}
        for site in unit.sites:
            if site in decided.weights:
                continue
            quantizer = self._quantizer(self.nodes.weights[site][0])
            if options.learned == "rounding":
                known = self.chosen.weights.get(site)
                made[site] = SoftRounding(self._weight_of[site], quantizer, known, learn=options.level_lr > 0)
            else:
                made[site] = StraightThrough(self._start_of[site], quantizer)
        for group in self._groups(unit):
            if group not in decided.steps:
                calibrated = self._quantizer(self.nodes.activations[group][0])
                start = FakeQuantize(starts[group]) if starts and group in starts else calibrated
                made[_step_key(group)] = LearnedActivation(start, options.step_lr > 0, options.drop, generator)
        return made

    def has_open(self, unit: Unit, decided: Outcome, options: Reconstruction) -> bool:
        """Whether anything of a unit is left to learn."""
        weights = any(site not in decided.weights for site in unit.sites)
        return weights or (options.step_lr > 0 and any(group not in decided.steps for group in self._groups(unit)))

    def decided(self, unit: Unit, learned: Mapping[str, nn.Module]) -> Outcome:
        """Return the tensors that the modules have learned; what was not learned is as it started."""
        outcome = Outcome()
        for name, module in learned.items():
            if isinstance(module, SoftRounding | StraightThrough):
                outcome.weights[name] = module.hard().detach()
                if module.factor.requires_grad:
                    outcome.scales[name] = module.steps().detach()
                    if (levels := module.whole_levels()) is not None:
                        outcome.levels[name] = levels
        for group in self._groups(unit):
            if isinstance(activation := learned.get(_step_key(group)), LearnedActivation):
                outcome.steps[group] = activation.steps().detach()
                outcome.zero_points[group] = activation.zero_point
        return outcome

    def as_calibrated(self, unit: Unit, decided: Outcome) -> Outcome:
        """Return nearest rounding, or an earlier algorithm's, and calibrated steps where no earlier unit decided."""
        sites = [site for site in unit.sites if site not in decided.weights]
        groups = [group for group in self._groups(unit) if group not in decided.steps]
        steps = {group: self._calibrated(group).scale for group in groups}
        return Outcome({s: self._nearest(s) for s in sites}, {}, steps, {}, self._chosen_biases(sites))

    def in_place(self, learned: Mapping[str, nn.Module], decided: Outcome) -> dict[str, nn.Module]:
        """Return node name -> the module that learns a quantizer or an op's bias, else its decided value."""
        places: dict[str, nn.Module] = {}
        for site, names in self.nodes.weights.items():
            if site in learned or site in decided.weights:
                places |= dict.fromkeys(names, learned.get(site) or DecidedWeight(decided.weights[site]))
        places |= {op: DecidedBias(bias) for op, bias in decided.biases.items()}
        for group, names in self.nodes.activations.items():
            if _step_key(group) in learned:
                places |= dict.fromkeys(names, learned[_step_key(group)])
            elif group in decided.steps:
                places |= dict.fromkeys(names, FakeQuantize(self.with_step(group, decided)))
        return places

    def with_step(self, group: str, decided: Outcome) -> Grid:
        """Return the grid of a group's values as decided."""
        known = self._calibrated(group)
        return replace(known, scale=decided.steps[group], zero_point=decided.zero_points.get(group, known.zero_point))

    def starts(
        self, unit: Unit, decided: Outcome, take: Callable[[Iterable[str]], Mapping[str, Tensor]]
    ) -> dict[str, Grid]:
        """Return group name -> grid found on the values that the unit has behind the quantized network.

        Args:
            unit: with its weights as calibrated.
            decided: of earlier units.
            take: names of values in front of the unit -> those values over some images.
        """
        groups = [group for group in self._groups(unit) if group not in decided.steps]
        plain = decided.joined(self.as_calibrated(unit, decided))

        def values(group: str, found: Mapping[str, Grid]) -> Tensor:
            nodes = [resolve(self.module.graph, n) for n in self.nodes.activations[group] if n in unit.nodes]
            sources = [node.all_input_nodes[0].name for node in nodes]
            inside = tuple(name for name in sources if name in unit.nodes)
            held = dict(take([name for name in sources if name not in inside]))
            if inside:
                steps = {name: grid.scale for name, grid in found.items()}
                zero_points = {name: grid.zero_point for name, grid in found.items()}
                places = self.in_place({}, plain.joined(Outcome(steps=steps, zero_points=zero_points)))
                span = cut_span(self.module, unit.nodes, inside, quantized=True, replacements=places)
                with torch.no_grad():
                    held |= span(take(span.inputs))
            return torch.cat([held[name].flatten() for name in sources])

        return activation_starts({group: self._calibrated(group) for group in groups}, values)

    def _groups(self, unit: Unit) -> list[str]:
        return list(dict.fromkeys(self._group_of[name] for name in unit.nodes if name in self._group_of))

    def _calibrated(self, group: str) -> Grid:
        return self._quantizer(self.nodes.activations[group][0]).grid

    def _chosen_biases(self, sites: Iterable[str]) -> dict[str, Tensor]:
        names = [op for site in sites for op in self._ops[site]]
        return {name: self.chosen.biases[name] for name in names if name in self.chosen.biases}

    def _nearest(self, site: str) -> Tensor:
        with torch.no_grad():
            rounded: Tensor = self._quantizer(self.nodes.weights[site][0])(self._start_of[site])
        return rounded

    def _quantizer(self, name: str) -> FakeQuantize:
        found = self.module.get_submodule(self._paths[name])
        assert isinstance(found, FakeQuantize)
        return found


def _step_key(group: str) -> str:
    """Return the key of a group among learned modules; sites are keyed by their own names."""
    return f"values of {group}"
