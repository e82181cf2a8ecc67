"""Values of a network over all calibration images: kept, kept in half the bytes, or computed again for each batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.core.ir import sample_shape
from fxquant.core.run import Span
from fxquant.passes.rounding.learned.units import Unit

RUN = 32
"""Images that run through a span at a time when its values are kept."""


class Source:
    """The values that cross the cut before the current unit, of the float or of the quantized network.

    Args:
        images: placeholder name -> images.
        keep: type that values are kept in; None runs all units before the cut again for each batch.
    """

    def __init__(self, images: Mapping[str, Tensor], keep: torch.dtype | None) -> None:
        self._images = dict(images)
        self._keep = keep
        self._values: dict[str, Tensor] = dict(images)
        self._chain: list[Span] = []

    def __len__(self) -> int:
        return len(next(iter(self._images.values())))

    def advance(self, span: Span, needed: Iterable[str]) -> None:
        """Move the cut behind a unit.

        Args:
            span: the unit, as decided.
            needed: names of the values that later units read.
        """
        if self._keep is None:
            self._chain.append(span)
            return
        made = self._run(span)
        wanted = set(needed)
        self._values = {name: value for name, value in {**self._values, **made}.items() if name in wanted}

    def outputs(self, span: Span) -> Mapping[str, Tensor] | None:
        """Return a span's outputs over all images in the type that is kept, None if values are not kept."""
        return None if self._keep is None else self._run(span)

    def take(self, names: Iterable[str], index: Tensor) -> dict[str, Tensor]:
        """Return values of some images, name -> (len(index), ...), in float32 unless they are integers."""
        if self._keep is not None:
            return {name: _restored(self._values[name][index]) for name in names}
        values: dict[str, Tensor] = {name: images[index] for name, images in self._images.items()}
        with torch.no_grad():
            for span in self._chain:
                values |= span(values)
        return {name: values[name] for name in names}

    def _run(self, span: Span) -> dict[str, Tensor]:
        return span.over(partial(self.take, span.inputs), len(self), RUN, self._keep)


def _restored(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def kept_bytes(module: GraphModule, units: Iterable[Unit], images: int, copies: int) -> int:
    """Return the most bytes that are kept at any unit, in float32.

    Args:
        module: the graph of the units.
        units: all units.
        images: number of images.
        copies: of the values that cross the cut before a unit (float, quantized, corrected), including those that only
            later units read; the unit's outputs are kept once in addition.
    """
    size = {node.name: 4 * prod(sample_shape(node)) for node in module.graph.nodes}
    most, made, read = 0, set[str](), set[str]()
    # Backwards: a value that crosses a cut is read behind it and not computed there.
    for unit in reversed(tuple(units)):
        made |= set(unit.nodes)
        read |= set(unit.inputs)
        crossing = sum(size[name] for name in read - made)
        most = max(most, copies * crossing + sum(size[name] for name in unit.outputs))
    return most * images


def kept_type(needed: int, limit: int) -> torch.dtype | None:
    """Return the type in which values fit into `limit` bytes, None if there is none."""
    if needed <= limit:
        return torch.float32
    return torch.bfloat16 if needed // 2 <= limit else None
