"""What each layer may be: its weight in every format, with input channels split or left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxquant.core.ir import Choice, RowGrid, WeightFormat
from fxquant.passes.formats import RowProblem, RowRounder, find
from fxquant.passes.formats.problem import nearest_rows
from fxquant.passes.reshaping.drop_channels import drop_channels
from fxquant.passes.reshaping.layer_inputs import Layer
from fxquant.passes.reshaping.split_channels import saved_by_splitting, split_channels
from fxquant.passes.rounding.closed_form import gptq_rounder


@dataclass(frozen=True, eq=False)
class Variant:
    """One column of the program: a layer's format, and which of its input channels are split or left out.

    Args:
        site: name of the layer.
        choice: its precision.
        split: input channels that are read twice.
        dropped: input channels that are left out.
        inputs: input channels of the layer as it is.
        weight: float weight in the new shape; None for a layer that keeps its weight.
        effective: rounded weight in the old shape, halves added up and zeros where channels are left out; None where it
            was not rounded.
    """

    site: str
    choice: Choice
    split: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    inputs: int = 1
    weight: Tensor | None = field(default=None, repr=False)
    effective: Tensor | None = field(default=None, repr=False)

    @property
    def factor(self) -> float:
        """Its weights and products, times those of the layer as it is."""
        return (self.inputs + len(self.split) - len(self.dropped)) / self.inputs


def counts_of(ratios: Sequence[float], channels: int) -> tuple[int, ...]:
    """Return how many channels the ratios stand for, rounded down, each once, without 0 and all."""
    return tuple(sorted({n for n in (int(ratio * channels + 1e-9) for ratio in ratios) if 0 < n < channels}))


def variants_of(
    layer: Layer, choices: Sequence[Choice], expand: Sequence[float], prune: Sequence[float], rounds: bool
) -> list[Variant]:
    """Return the variants of a layer: each choice as it is, and at every ratio.

    Which channels are split depends on the format: those that lose most squared error by it, weighed by the power of
    their input. Which are left out does not.

    Args:
        layer: with the moments of its input.
        choices: precisions; float ones stay as they are.
        expand: shares of the input channels that may be split.
        prune: shares that may be left out.
        rounds: whether weights are rounded by GPTQ, else to nearest.
    """
    whole, inputs, site = _Rounded(layer.gram, rounds), layer.channels, layer.site.name
    splits, drops = counts_of(expand, inputs), counts_of(prune, inputs)
    dropped = drop_channels(layer.rows, layer.gram, layer.taps, drops) if drops else {}
    made = []
    for choice in choices:
        if choice.is_float:
            made.append(Variant(site, choice, inputs=inputs))
            continue
        values, grid = whole.of(layer.rows, choice.weight)
        effective = values.reshape(layer.weight.shape).float()
        made.append(Variant(site, choice, inputs=inputs, effective=effective))
        for channels in _outliers(layer, grid, splits):
            made.append(_split(layer, choice, channels, grid, rounds))
        for each in dropped.values():
            left = [c for c in range(inputs) if c not in each.channels]
            columns = _columns(left, layer.taps)
            part, _ = _Rounded(layer.gram[columns][:, columns], rounds).of(each.rows[:, columns], choice.weight)
            full = torch.zeros_like(each.rows)
            full[:, columns] = part
            weight = each.rows.reshape(layer.weight.shape)[:, left].float()
            shaped = full.reshape(layer.weight.shape).float()
            gone = tuple(sorted(each.channels))
            made.append(Variant(site, choice, dropped=gone, inputs=inputs, weight=weight, effective=shaped))
    return made


def _split(layer: Layer, choice: Choice, channels: tuple[int, ...], grid: RowGrid, rounds: bool) -> Variant:
    step = grid.scale[0, :, 0] if grid.levels is None else None
    weight = split_channels(layer.weight.detach().double(), channels, step)
    columns = _columns([*range(layer.channels), *channels], layer.taps)
    values, _ = _Rounded(layer.gram[columns][:, columns], rounds).of(weight.flatten(1), choice.weight)
    shaped = values.reshape(weight.shape)
    effective = shaped[:, : layer.channels].clone()
    effective[:, list(channels)] += shaped[:, layer.channels :]
    own, inputs = weight.float(), layer.channels
    return Variant(layer.site.name, choice, channels, inputs=inputs, weight=own, effective=effective.float())


def _outliers(layer: Layer, grid: RowGrid, counts: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the channels that are split, for each count; none where the format has no even steps."""
    if grid.levels is not None or not counts:
        return []
    importance = layer.gram.diagonal().reshape(1, 1, -1)
    saved = saved_by_splitting(layer.rows.unsqueeze(0), grid, importance, layer.taps)
    order = saved.argsort(descending=True, stable=True).tolist()
    return [tuple(sorted(order[:count])) for count in counts]


def _columns(channels: Sequence[int], taps: int) -> Tensor:
    """Return the columns of a weight by rows that belong to input channels."""
    return (torch.tensor(channels).reshape(-1, 1) * taps + torch.arange(taps)).flatten()


class _Rounded:
    """Rounds weights that read one input, in any format."""

    def __init__(self, gram: Tensor, rounds: bool) -> None:
        self._gram = gram.unsqueeze(0)
        self._rounder: RowRounder = gptq_rounder(self._gram) if rounds else nearest_rows

    def of(self, rows: Tensor, weight: WeightFormat) -> tuple[Tensor, RowGrid]:
        """Return rounded rows (rows, K), and their grid."""
        problem = RowProblem(rows.unsqueeze(0), self._gram, self._rounder)
        grid = find(problem, weight)
        return grid.value(problem.rounded(grid))[0], grid
