"""`WeightFormat`: which values a weight may take, as a kind of levels and the bits that store one of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fxquant.core.errors import OptionError

FLOAT_BITS = 32
"""The bit width that means "left in float32"."""

MIN_BITS = 2
MAX_BITS = 8


@dataclass(frozen=True)
class FormatKind:
    """One kind of weight format.

    Args:
        suffix: written behind the bits in labels, for example `c` in `W2cA8`.
        least: fewest bits.
        most: most bits.
        fractional: whether bits may be a fraction, as an average over rows is.
    """

    suffix: str
    least: int
    most: int
    fractional: bool = False


FORMAT_KINDS = {
    "uniform": FormatKind("", MIN_BITS, MAX_BITS),
    "codebook": FormatKind("c", 1, 4, fractional=True),
    "pow2": FormatKind("p", 2, 4),
    "row-mixed": FormatKind("r", MIN_BITS, MAX_BITS, fractional=True),
    "two-scheme": FormatKind("s", 4, MAX_BITS, fractional=True),
}
"""Kind -> what is known of it: evenly spaced levels; any `floor(2^bits)` int8 levels for each channel; zero and powers
of two; another width for each output channel; powers of two or 4 bits or 8 bits for each output channel."""


@dataclass(frozen=True, order=True)
class WeightFormat:
    """How a weight is stored: bits for each element, and the kind of its levels.

    Args:
        bits: bits of one element, the average over the elements where rows are mixed; 1.6 is a codebook of 3 levels;
            32 is float.
        kind: one of `FORMAT_KINDS`.

    Raises:
        OptionError: an unknown kind, or bits that this kind does not have.
    """

    bits: float
    kind: str = "uniform"

    def __post_init__(self) -> None:
        known = FORMAT_KINDS.get(self.kind)
        if known is None:
            raise OptionError(f"weight format {self.kind!r} is unknown; known: {', '.join(FORMAT_KINDS)}")
        if self.bits == FLOAT_BITS and self.kind == "uniform":
            return
        if not known.least <= self.bits <= known.most or not (known.fractional or float(self.bits).is_integer()):
            also = f", or {FLOAT_BITS} for float" if self.kind == "uniform" else ""
            raise OptionError(
                f"weight bits {self.bits:g} are out of range; {self.kind} has {known.least}..{known.most}{also}"
            )

    @property
    def is_float(self) -> bool:
        """Whether the weight stays in float32."""
        return self.bits == FLOAT_BITS

    @property
    def label(self) -> str:
        """Bits and the suffix of the kind: `4`, `2c`, `2.5r`."""
        return f"{self.bits:g}{FORMAT_KINDS[self.kind].suffix}"

    @staticmethod
    def parse(text: str | float) -> WeightFormat:
        """Read a label, or a plain number of bits, which means uniform levels.

        Raises:
            OptionError: it is neither.
        """
        match = re.fullmatch(
            r"([0-9]{1,2}(?:\.[0-9]{1,3})?)([a-z]?)", f"{text:g}" if not isinstance(text, str) else text
        )
        kinds = {known.suffix: kind for kind, known in FORMAT_KINDS.items()}
        if match is None or match[2] not in kinds:
            written = ", ".join(f"3{suffix}" for suffix in kinds)
            raise OptionError(f"weight format {text!r} is not understood; write bits and a kind: {written}")
        bits = float(match[1])
        return WeightFormat(int(bits) if bits.is_integer() else bits, kinds[match[2]])
