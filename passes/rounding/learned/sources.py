"""Values of a network over all calibration images: kept, kept in half the bytes, or made anew for each batch."""

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
"""Images that flow through a span at a time when its values are kept."""


class Source:
    """The values that cross the cut in front of the unit under way, of the float or of the quantized network.

    Args:
        images: placeholder name -> images.
        keep: type that values are kept in, None to run all units in front of the cut again for each batch.
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
            span: the unit, as it stays.
            needed: names of the values that are still read behind it.
        """
        if self._keep is None:
            self._chain.append(span)
            return
        made = self._run(span)
        wanted = set(needed)
        self._values = {name: value for name, value in {**self._values, **made}.items() if name in wanted}

    def outputs(self, span: Span) -> Mapping[str, Tensor] | None:
        """Return a span's outputs over all images as they would be kept, None where nothing is."""
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
    """Return the bytes in float32 of what is kept at the unit where it is most.

    Args:
        module: the graph the units are of.
        units: all of them.
        images: how many.
        copies: of the values that cross the cut in front of each unit (float, quantized, corrected), those that only
            later units read included; its outputs are kept once besides.
    """
    size = {node.name: 4 * prod(sample_shape(node)) for node in module.graph.nodes}
    most, made, read = 0, set[str](), set[str]()
    # From behind: what crosses a cut is read behind it and not made there.
    for unit in reversed(tuple(units)):
        made |= set(unit.nodes)
        read |= set(unit.inputs)
        crossing = sum(size[name] for name in read - made)
        most = max(most, copies * crossing + sum(size[name] for name in unit.outputs))
    return most * images


def kept_type(needed: int, limit: int) -> torch.dtype | None:
    """Return the type to keep values in so that they fit into `limit` bytes, None where they do not."""
    if needed <= limit:
        return torch.float32
    return torch.bfloat16 if needed // 2 <= limit else None
