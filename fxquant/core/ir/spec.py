"""What a quantizer does (`QuantSpec`), where it sits (`Edge`), and what can be chosen (`Choice`, `Candidate`)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from fxquant.core.errors import OptionError
from fxquant.core.ir.weight_format import FLOAT_BITS, MAX_BITS, MIN_BITS, WeightFormat


@dataclass(frozen=True, order=True)
class QuantSpec:
    """One affine integer grid: `q = clamp(round(x / scale) + zero_point, qmin, qmax)`.

    Args:
        bits: width of the grid, 2..8.
        signed: True for `[-2^(bits-1), 2^(bits-1) - 1]`, False for `[0, 2^bits - 1]`.
        symmetric: True keeps zero_point at 0.
        channel_axis: axis with one scale per index, so scale has shape `(x.shape[channel_axis],)`;
            None means one scale for the tensor, shape `()`.

    Raises:
        OptionError: bits out of range, or an unsigned symmetric grid.
    """

    bits: int
    signed: bool
    symmetric: bool
    channel_axis: int | None = None

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise OptionError(f"bits={self.bits} is out of range; allowed: {MIN_BITS}..{MAX_BITS}")
        if self.symmetric and not self.signed:
            raise OptionError("an unsigned grid cannot be symmetric; use signed=True or symmetric=False")

    @property
    def qmin(self) -> int:
        """Smallest integer of the grid."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest integer of the grid."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


def weight_spec(bits: int, channel_axis: int = 0) -> QuantSpec:
    """Return the grid of weights: signed, symmetric, one scale per output channel."""
    return QuantSpec(bits=bits, signed=True, symmetric=True, channel_axis=channel_axis)


def activation_spec(bits: int) -> QuantSpec:
    """Return the grid of activations: unsigned, affine, one scale per tensor (what VNNI kernels take)."""
    return QuantSpec(bits=bits, signed=False, symmetric=False)


@dataclass(frozen=True, order=True)
class Edge:
    """A use of a tensor: `producer`'s output read by `consumer` at argument `slot`.

    Names instead of nodes, so that an edge survives graph copies, sorts, and saves as JSON. `slot` counts the
    tensor inputs of the consumer in the order of `Node.all_input_nodes`.
    """

    producer: str
    consumer: str
    slot: int


@dataclass(frozen=True, order=True)
class Choice:
    """Precision of one site: the format of its weights, and the bits of the activation it reads.

    Args:
        weight_bits: bits of the weight format, or 32 for float.
        activation_bits: 2..8, or 32 for float; float weights only read float.
        kind: kind of the weight format (see `WeightFormat`).

    Raises:
        OptionError: a width out of range, an unknown kind, or float weights that read integers.
    """

    weight_bits: float
    activation_bits: int
    kind: str = "uniform"

    def __post_init__(self) -> None:
        _ = self.weight
        if self.activation_bits != FLOAT_BITS and not MIN_BITS <= self.activation_bits <= MAX_BITS:
            raise OptionError(
                f"activation_bits={self.activation_bits} is out of range; allowed: {MIN_BITS}..{MAX_BITS}, or "
                f"{FLOAT_BITS} for float"
            )
        if self.weight_bits == FLOAT_BITS and self.activation_bits != FLOAT_BITS:
            raise OptionError(
                f"W{self.weight_bits:g}A{self.activation_bits} has float weights that read integers; "
                f"use {FLOAT_BITS} for both"
            )

    @staticmethod
    def of(weight: WeightFormat, activation_bits: int) -> Choice:
        """Return the choice of a weight format and a width of activations; float weights read float activations."""
        return FLOAT if weight.is_float else Choice(weight.bits, activation_bits, weight.kind)

    @property
    def weight(self) -> WeightFormat:
        """The format of the weights."""
        return WeightFormat(self.weight_bits, self.kind)

    @property
    def is_float(self) -> bool:
        """Whether the site stays in float32."""
        return self.weight_bits == FLOAT_BITS

    @property
    def weights_only(self) -> bool:
        """Whether the weights are stored in a format, and multiplied in float."""
        return not self.is_float and self.activation_bits == FLOAT_BITS

    @property
    def alone(self) -> Choice:
        """The same format for weights that are only stored."""
        return replace(self, activation_bits=FLOAT_BITS)

    @property
    def label(self) -> str:
        """`W4A8`, `W2cA8`, `W2.5rA8`, `W4` for weights alone, or `float`."""
        if self.is_float:
            return "float"
        return f"W{self.weight.label}" + ("" if self.weights_only else f"A{self.activation_bits}")

    @staticmethod
    def parse(label: str) -> Choice:
        """Read a label back.

        Raises:
            OptionError: the text is no label.
        """
        if label == "float":
            return FLOAT
        match = re.fullmatch(r"W([0-9]{1,2}(?:\.[0-9]{1,3})?[a-z]?)(?:A([0-9]{1,2}))?", label)
        if match is None:
            raise OptionError(
                f"precision {label!r} is not understood; write W4A8 (weight and activation bits), W2cA8 (a codebook), "
                "W2.5rA8 (rows of several widths), W4 (weights alone) or float"
            )
        weight = WeightFormat.parse(match[1])
        return Choice(weight.bits, int(match[2] or FLOAT_BITS), weight.kind)


FLOAT = Choice(FLOAT_BITS, FLOAT_BITS)
"""The choice of leaving a site in float32."""


@dataclass(frozen=True, order=True)
class Candidate:
    """One column of the integer program: site `site` gets precision `choice`."""

    site: str
    choice: Choice


@dataclass(frozen=True)
class Site:
    """A place whose precision is decided: one weight tensor and every node that uses it.

    Args:
        name: module path of the weight, for example `layer1.0.conv1`; unique.
        kind: kind of the op from the op table, for example `conv` or `linear`.
        weight: attribute path of the weight tensor in the graph module.
        nodes: names of the nodes that read the weight (several when modules are shared).
        weight_count: number of weight elements.
        channels: number of scales, that is output channels.
        bias_count: number of bias elements, 0 without bias.
        macs: multiply-accumulates for one sample, summed over `nodes`.
        input_tie: name of the activation group that `nodes` read; sites with one name agree on activation bits. A
            stored site has one of its own.
        choices: allowed precisions, at least one, in ascending order.
        followers: names of the float ops that read the same weight as it is stored, an embedding tied to a classifier.

    Raises:
        OptionError: no choices.
    """

    name: str
    kind: str
    weight: str
    nodes: tuple[str, ...]
    weight_count: int
    channels: int
    bias_count: int
    macs: int
    input_tie: str
    choices: tuple[Choice, ...]
    followers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.choices:
            raise OptionError(f"site {self.name!r} has no allowed precision; give it at least one")

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of all nodes that read the weight as it is stored."""
        return (*self.nodes, *self.followers)

    @property
    def stored(self) -> bool:
        """Whether its weight is only stored in a format: the op that reads it has no integer kernel."""
        return any(choice.weights_only for choice in self.choices)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The site's columns of the integer program."""
        return tuple(Candidate(self.name, choice) for choice in self.choices)


@dataclass(frozen=True)
class Sites:
    """Every place whose precision is decided, and what stays in float with the reason.

    Args:
        sites: the places, in graph order, with unique names.
        refusals: node name -> reason for each multiply-accumulate or table-look-up op left in float.

    Raises:
        OptionError: two sites of one name.
    """

    sites: tuple[Site, ...]
    refusals: dict[str, str]

    def __post_init__(self) -> None:
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise OptionError(f"site names are not unique: {sorted({n for n in names if names.count(n) > 1})}")

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All columns of the integer program, grouped by site."""
        return tuple(candidate for site in self.sites for candidate in site.candidates)

    def by_name(self, name: str) -> Site:
        """Return the site called `name`.

        Raises:
            OptionError: there is none.
        """
        for site in self.sites:
            if site.name == name:
                return site
        raise OptionError(f"no site is called {name!r}; sites: {', '.join(s.name for s in self.sites)}")


def site_name(weight: str) -> str:
    """Return the name of the site that owns the weight at this attribute path: its module path."""
    return weight.removesuffix(".weight")
