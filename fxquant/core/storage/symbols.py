"""Small whole numbers as bytes: digits below a number of levels that is no power of two take no bit more than needed.

Digits become symbols: `per` digits below `levels` are one number, so that three levels take 1.6 bits and five take 2.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxquant.core.errors import OptionError

Array = NDArray[Any]


@dataclass(frozen=True)
class Code:
    """How digits are made symbols: `symbol = sum over k of digit[k] levels^k`.

    Args:
        levels: values of a digit.
        per: digits in a symbol.
        bits: of a symbol, 8 or 12; the upper 4 of 12 are stored apart, two to the byte.

    Raises:
        OptionError: symbols that do not fit.
    """

    levels: int
    per: int
    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (8, 12) or self.levels**self.per > 1 << self.bits:
            raise OptionError(
                f"{self.per} digits below {self.levels} do not fit a symbol of {self.bits} bits (8 or 12)"
            )

    @property
    def width(self) -> float:
        """Bits of a digit."""
        return self.bits / self.per

    @property
    def factors(self) -> Array:
        """What the digits of a symbol count, int64 `(per,)`."""
        powers: Array = self.levels ** np.arange(self.per)
        return powers

    def sizes(self, count: int) -> tuple[int, ...]:
        """Return the bytes of each array that `encode` makes of `count` digits."""
        symbols = -(-count // self.per)
        return (symbols,) if self.bits == 8 else (symbols, -(-symbols // 2))

    def encode(self, digits: Array) -> tuple[Array, ...]:
        """Return digits as uint8: the low bytes of their symbols, then the upper halves where there are any."""
        filled = np.concatenate([digits, np.zeros(-len(digits) % self.per, np.uint8)]).reshape(-1, self.per)
        symbols = filled.astype(np.uint16) @ self.factors.astype(np.uint16)
        low = symbols.astype(np.uint8)
        if self.bits == 8:
            return (low,)
        upper = np.concatenate([symbols >> 8, np.zeros(len(symbols) % 2, np.uint16)]).astype(np.uint8)
        return low, upper[::2] | upper[1::2] << 4

    def decode(self, stored: Sequence[Array], count: int) -> Array:
        """Return the `count` digits that `encode` was given, uint8."""
        symbols = stored[0].astype(np.uint16)
        if self.bits == 12:
            upper = np.stack([stored[1] & 15, stored[1] >> 4], axis=1).reshape(-1)
            symbols |= upper[: len(symbols)].astype(np.uint16) << 8
        digits = symbols[:, None] // self.factors.astype(np.uint16) % self.levels
        return digits.astype(np.uint8).reshape(-1)[:count]


CODES = (Code(2, 8, 8), Code(3, 5, 8), Code(4, 4, 8), Code(5, 5, 12), Code(6, 3, 8), Code(8, 4, 12), Code(16, 2, 8))
"""From few levels to many, each in fewer bits than the next."""
MOST_LEVELS = CODES[-1].levels


def code_for(levels: int) -> Code:
    """Return the shortest code for digits of so many levels, 1..16."""
    return next(code for code in CODES if levels <= code.levels)
