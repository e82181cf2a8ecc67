"""What a backend can execute: data that passes read, so that no pass imports a backend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fxquant.core.errors import OptionError
from fxquant.core.ir import FLOAT_BITS, FORMAT_KINDS, MAX_BITS, WeightFormat

DEFAULT_FORMATS: tuple[tuple[int | str, ...], ...] = (("2c", 2), ("3c",), (4,), (6,), (8,))
"""The candidate weight formats where none are asked for: of each row, the first that the target executes.

`benchmarks.equal_bytes` compares other sets.
"""
NARROWER_FORMATS = ("1c", "1.6c", "2.4c")
"""Those that join them where no plan of the default ones keeps the budget."""


@dataclass(frozen=True)
class LatencyRow:
    """What one kind of layer takes at one precision, where it is known beforehand and not measured here.

        milliseconds = ms + ms_per_million_macs x MACs / 10^6 + ms_per_megabyte x bytes / 10^6

    Args:
        layers: pattern of layers (see `core.patterns`).
        precision: glob over precisions, for example "W8A8", "W4A*" or "float".
        ms: milliseconds for each call, at least 0.
        ms_per_million_macs: milliseconds for a million multiply-accumulates of one sample, at least 0.
        ms_per_megabyte: milliseconds to fetch 10^6 bytes of weights as they are stored, at least 0.

    Raises:
        OptionError: a time that is negative or not finite, or a row in which all are 0.
    """

    layers: str
    precision: str
    ms: float = 0.0
    ms_per_million_macs: float = 0.0
    ms_per_megabyte: float = 0.0

    def __post_init__(self) -> None:
        times = (self.ms, self.ms_per_million_macs, self.ms_per_megabyte)
        if not all(math.isfinite(time) and time >= 0 for time in times) or not any(times):
            raise OptionError(
                f"latency row {self.layers!r} {self.precision!r} has times {times}; give numbers of at least 0, "
                "one of them above"
            )


@dataclass(frozen=True)
class Target:
    """What one runtime executes in integers.

    Args:
        name: name in the registry, for example "onnxruntime".
        kernels: kind of a weighted op (`conv`, `linear`) -> name of its integer kernel; others stay in float.
        joins: kinds of ops without weights that run in integers when all their inputs and their output are quantized.
        weight_bits: widths that execute.
        activation_bits: widths that execute.
        storage_bits: weight width -> width it is stored in; a width without a type takes the next one.
        output_quantized: kinds whose kernel can only write integers, so that their output carries a quantizer.
        fused_sums: kinds whose kernel adds a second operand before it rounds: what only a sum reads needs no quantizer.
        refuse_joins: kind -> why it stays in float although it could be quantized.
        products: kinds of ops on two activations whose inputs are quantized for their own sake.
        activation_storage_bits: activation width -> width it is stored in; a width that is not named takes 8.
        per_channel: whether weights have a scale for each output channel; else one for the tensor.
        latency: rows that say what a layer takes, the first that matches; without any it is measured on this machine.
        runs_on: name of the backend that runs its graphs here; None for the one registered under the target's name.
        weight_formats: kinds of weight formats beside "uniform" that it stores (see `WeightFormat`).

    Raises:
        OptionError: a storage width that is narrower than the width it stores, one of a weight that is missing, or an
            unknown weight format.
    """

    name: str
    kernels: Mapping[str, str]
    joins: frozenset[str]
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    storage_bits: Mapping[int, int]
    output_quantized: frozenset[str] = frozenset()
    fused_sums: frozenset[str] = frozenset()
    refuse_joins: Mapping[str, str] = field(default_factory=dict)
    activation_storage_bits: Mapping[int, int] = field(default_factory=dict)
    products: frozenset[str] = frozenset()
    per_channel: bool = True
    latency: tuple[LatencyRow, ...] = ()
    runs_on: str | None = None
    weight_formats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weight_formats) - set(FORMAT_KINDS))
        if unknown:
            raise OptionError(f"target {self.name!r} names weight formats {unknown}; known: {', '.join(FORMAT_KINDS)}")
        for bits in self.weight_bits:
            stored = self.storage_bits.get(bits)
            if stored is None or stored < bits:
                raise OptionError(
                    f"target {self.name!r} stores {bits}-bit weights in {stored} bits; give a width >= {bits}"
                )
        for bits in self.activation_bits:
            stored = self.activation_storage(bits)
            if stored < bits:
                raise OptionError(
                    f"target {self.name!r} stores {bits}-bit activations in {stored} bits; give a width >= {bits}"
                )

    @property
    def default_bits(self) -> tuple[int | str, ...]:
        """The candidate weight formats where none are asked for, as in `Settings.bits`."""
        executed = ([text for text in row if self.executes(WeightFormat.parse(text))] for row in DEFAULT_FORMATS)
        return tuple(row[0] for row in executed if row) or self.weight_bits

    @property
    def narrower_bits(self) -> tuple[str, ...]:
        """The formats that join the default ones where those cannot keep a budget."""
        return tuple(text for text in NARROWER_FORMATS if self.executes(WeightFormat.parse(text)))

    def executes(self, weight: WeightFormat) -> bool:
        """Whether weights of a format can be stored and run in integers."""
        return weight.bits in self.weight_bits if weight.kind == "uniform" else weight.kind in self.weight_formats

    @property
    def packs(self) -> bool:
        """Whether weights are stored in the shortest form of their integers, instead of at a declared width."""
        return self.runs_on is None and all(self.storage_bits[bits] == bits for bits in self.weight_bits)

    def stored_bits(self, weight: WeightFormat) -> float:
        """Return the bits that store one element of a weight, 32 for float."""
        if weight.is_float or weight.kind != "uniform":
            return weight.bits
        return self.storage_bits[int(weight.bits)]

    @property
    def formats_text(self) -> str:
        """The weight formats that execute, for messages: widths, then a label for each other kind."""
        kinds = (FORMAT_KINDS[kind] for kind in self.weight_formats)
        others = [f"{known.least}{known.suffix}..{known.most}{known.suffix}" for known in kinds]
        return f"[{', '.join([*map(str, sorted(self.weight_bits)), *others])}]"

    @property
    def runner(self) -> str:
        """Name of the backend that runs its graphs here."""
        return self.runs_on or self.name

    def activation_storage(self, bits: int) -> int:
        """Return the bits that hold one element of an activation of this width, 2..8, or 32 for float."""
        # Runtimes for this machine hold every integer activation in a byte; an accelerator may pack narrower ones.
        return FLOAT_BITS if bits == FLOAT_BITS else self.activation_storage_bits.get(bits, MAX_BITS)
