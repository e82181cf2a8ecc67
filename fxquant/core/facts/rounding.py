"""The weights, biases and grids that rounding algorithms chose for one plan."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.facts.weight_grids import WeightGrids
from fxquant.core.ir import FLOAT_BITS, MAX_BITS, Choice, Grid, Program, QuantSpec, activation_spec
from fxquant.core.storage import checked_document, parse_json, read_arrays, write_arrays

FORMAT_VERSION = 1


@dataclass(frozen=True)
class UnitRecord:
    """Outcome of one unit of the network.

    Args:
        name: the unit's first site.
        method: the algorithm.
        before: held-out loss of the network, quantized up to this unit, with the unit as it was; NaN if not measured.
            Of the whole network, the geometric mean of that and of the loss that plans are measured by.
        after: the same with the unit's result.
        kept: whether the result was accepted.
        reason: why it was not, "" if it was.
        seconds: wall time.
        sites: the sites whose weights it holds.
    """

    name: str
    method: str
    before: float
    after: float
    kept: bool
    reason: str = ""
    seconds: float = 0.0
    sites: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rounding:
    """The choices of rounding algorithms for one plan, which `simulate` applies to that plan's graph.

    Args:
        choices: the plan it was made for.
        method: the algorithms, in order, joined by "+".
        weights: site name -> weight in float32; values off its grid mean the nearest value on it.
        grids: site name -> grid of that weight where it is not the plan's own.
        biases: op node name -> bias in float32, shape (channels,).
        activations: group name -> grid of its values, scale and zero_point of shape ().
        parameters: attribute path -> float parameter that replaces the model's own without changing the float network's
            function (equalization).
        units: outcome of each unit.
        notes: further information for the user, for example which step was left out and why.

    Raises:
        OptionError: no plan, or a tensor that is not finite.
    """

    choices: dict[str, Choice]
    method: str
    weights: dict[str, Tensor] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    activations: dict[str, Grid] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    units: tuple[UnitRecord, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.choices:
            raise OptionError("a rounding needs the plan it was made for; its choices are empty")
        kinds: dict[str, dict[str, Tensor]] = {
            "weight": self.weights,
            "weight scale": {name: grid.scale for name, grid in self.grids.items()},
            "bias": self.biases,
            "scale": {name: grid.scale for name, grid in self.activations.items()},
            "parameter": self.parameters,
        }
        for kind, tensors in kinds.items():
            for name, tensor in tensors.items():
                if not torch.isfinite(tensor).all():
                    raise OptionError(f"rounding {self.method!r} gives a {kind} of {name!r} that is not finite")

    @staticmethod
    def of(program: Program, choices: dict[str, Choice]) -> Rounding:
        """Return the program's rounding if it was made for these choices, else an empty one.

        Equalized parameters are in the program's graph whatever the plan, and stay.
        """
        known: Rounding | None = program.facts.get(Rounding)
        if known is None or known.holds_for(choices):
            return known or Rounding(choices, "nearest")
        return Rounding(choices, "nearest", parameters=known.parameters)

    def holds_for(self, choices: dict[str, Choice]) -> bool:
        """Whether this was made for these choices."""
        return self.choices == choices

    def grid_of(self, site: str, grids: WeightGrids) -> Grid:
        """Return the grid of a site's weight: one that an algorithm found, else the plan's.

        Args:
            site: its name.
            grids: of the program that this is a rounding of.

        Raises:
            OptionError: the plan's width was not a candidate.
        """
        return self.grids.get(site) or grids.at(site, self.choices[site].weight)

    def weight_of(self, site: str, grids: WeightGrids) -> Tensor | None:
        """Return the weight that takes the place of the model's own, None where that is rounded to nearest.

        Weights rounded before there was a plan lie on the plan's grid, and are of no use on another.
        """
        before_plan = None if site in self.grids else grids.rounded.get((site, self.choices[site].weight))
        return self.weights.get(site, before_plan)

    def save(self, path: Path) -> None:
        """Write the rounding as npz.

        Raises:
            OutputError: the folder cannot be written.
        """
        header = {
            "kind": "rounding",
            "version": FORMAT_VERSION,
            "method": self.method,
            "choices": {site: choice.label for site, choice in self.choices.items()},
            "notes": list(self.notes),
            "specs": {site: asdict(grid.spec) for site, grid in self.grids.items()},
            "activation_specs": {group: asdict(grid.spec) for group, grid in self.activations.items()},
            # JSON has no NaN: a loss that was not measured is null.
            "units": [{k: _plain(v) for k, v in asdict(unit).items()} for unit in self.units],
        }
        arrays = {"header": np.array(json.dumps(header))}
        for kind in ("weights", "biases", "parameters"):
            arrays |= {f"{kind}:{name}": _array(tensor) for name, tensor in getattr(self, kind).items()}
        for name, grid in self.grids.items():
            arrays |= {f"grid_scale:{name}": _array(grid.scale), f"grid_zero:{name}": _array(grid.zero_point)}
            arrays |= {} if grid.levels is None else {f"grid_levels:{name}": _array(grid.levels)}
        for name, grid in self.activations.items():
            arrays |= {f"scale:{name}": _array(grid.scale), f"zero:{name}": _array(grid.zero_point)}
        write_arrays(path, arrays)

    @staticmethod
    def load(path: Path) -> Rounding:
        """Read what `save` wrote.

        Raises:
            FileFormatError: missing, truncated, of another version or inconsistent.
        """
        arrays = read_arrays(path)
        try:
            header: dict[str, Any] = checked_document(
                parse_json(str(arrays["header"])), "rounding", FORMAT_VERSION, str(path)
            )
            members: dict[str, dict[str, Tensor]] = {}
            for key, array in arrays.items():
                kind, colon, name = key.partition(":")
                if colon:
                    members.setdefault(kind, {})[name] = torch.from_numpy(np.array(array))
            return Rounding(
                {str(site): Choice.parse(label) for site, label in header["choices"].items()},
                str(header["method"]),
                members.get("weights", {}),
                _grids(header["specs"], *(members.get(f"grid_{part}", {}) for part in ("scale", "zero", "levels"))),
                members.get("biases", {}),
                _grids(_activation_specs(header, members), members.get("scale", {}), members.get("zero", {})),
                members.get("parameters", {}),
                tuple(_record(unit) for unit in header["units"]),
                tuple(str(note) for note in header["notes"]),
            )
        except (KeyError, ValueError, TypeError, AttributeError, OptionError) as error:
            raise FileFormatError(f"{path} is not an intact rounding ({error}); quantize again") from error


def _grids(
    specs: dict[str, Any],
    scales: dict[str, Tensor],
    zero_points: dict[str, Tensor],
    levels: dict[str, Tensor] | None = None,
) -> dict[str, Grid]:
    return {
        name: Grid(QuantSpec(**spec), scales[name], zero_points[name], (levels or {}).get(name))
        for name, spec in specs.items()
    }


def _activation_specs(header: dict[str, Any], members: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """Return group -> spec; files of earlier code hold none, and are read if the plan has the largest width only."""
    widths = {Choice.parse(label).activation_bits for label in header["choices"].values()} - {FLOAT_BITS}
    if "activation_specs" not in header and widths == {MAX_BITS}:
        return dict.fromkeys(members.get("scale", {}), asdict(activation_spec(MAX_BITS)))
    specs: dict[str, Any] = header["activation_specs"]
    return specs


def _record(document: dict[str, Any]) -> UnitRecord:
    read: dict[str, Any] = {name: float("nan") if value is None else value for name, value in document.items()}
    return UnitRecord(**{**read, "sites": tuple(read["sites"])})


def _plain(value: object) -> object:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = tensor.detach().cpu().contiguous().numpy()
    return found
