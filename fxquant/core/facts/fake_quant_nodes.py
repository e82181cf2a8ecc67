"""Where the fake-quant nodes of a simulated graph are inserted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FakeQuantNodes:
    """The names of a simulated graph's quantizers.

    Args:
        weights: site name -> names of the fake-quant nodes on its weight.
        activations: group name -> names of the fake-quant nodes on its values.
        inputs: site name -> names of the fake-quant nodes its ops read their activation from.
    """

    weights: dict[str, tuple[str, ...]]
    activations: dict[str, tuple[str, ...]]
    inputs: dict[str, tuple[str, ...]]
