"""The form of fewest bytes for the integers of a weight, whatever grid they came from.

The int8 rows of a weight are cut into *parts* that are stored alike: as integers of `bits` bits, or as indices into
tables of levels, one table for one or for several rows. Both are digits, stored as `symbols` has them. Beside them only
the tables are stored, and the places of the rows where there are several parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fxquant.core.errors import OptionError
from fxquant.core.storage.symbols import CODES, MOST_LEVELS, Array, Code, code_for

SPAN = 256
"""Values of int8; half of it added to one is an index."""
LOW = 4
"""Bits of the lower plane of integers that are wider."""
JOIN = 100
"""Bytes of the nodes that unpack one more part, or tables where there are several, in an ONNX file (measured)."""


@dataclass(frozen=True, eq=False)
class Part:
    """Rows that are stored alike.

    Args:
        rows: how many.
        columns: integers in a row.
        bits: 1..8 for integers `-2^(bits-1) .. 2^(bits-1) - 1`, 0 for indices into tables.
        table: int8 `(tables, levels)`, each table for `rows / tables` rows in turn; None without.

    Raises:
        OptionError: both a width and tables or neither, too many levels, or tables that do not divide the rows.
    """

    rows: int
    columns: int
    bits: int = 0
    table: Array | None = None

    def __post_init__(self) -> None:
        fits = self.table is not None and self.table.shape[1] <= MOST_LEVELS and self.rows % len(self.table) == 0
        if fits != (self.bits == 0) or not 0 <= self.bits <= 8:
            raise OptionError(
                f"{self.rows} rows of {self.bits} bits are no part: give 1..8 bits, or 0 and tables of at most "
                f"{MOST_LEVELS} levels for equally many rows each"
            )

    @property
    def count(self) -> int:
        """Number of integers."""
        return self.rows * self.columns

    @property
    def codes(self) -> tuple[Code, ...]:
        """The code of each plane of digits, the lowest plane first; none for integers that are stored as they are."""
        if self.table is not None:
            return (code_for(self.table.shape[1]),)
        low, rest = min(self.bits, LOW), self.bits - LOW
        return () if self.bits == 8 else (code_for(1 << low), *([code_for(1 << rest)] if rest > 0 else []))

    @property
    def bytes(self) -> int:
        """What is stored, tables included."""
        return sum(self.sizes) + (0 if self.table is None else self.table.size)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each array of its planes, or of its integers as they are."""
        if not self.codes:
            return (self.count,)
        return tuple(size for code in self.codes for size in code.sizes(self.count))

    def digits(self, q: Array) -> list[Array]:
        """Return the planes of digits of int8 rows, each flat uint8."""
        if self.table is None:
            whole = q.reshape(-1).view(np.uint8)
            return [whole >> LOW * k & code.levels - 1 for k, code in enumerate(self.codes)]
        place = np.zeros((len(self.table), SPAN), np.uint8)
        # Backwards, for what fills up a table repeats its last level.
        for level in reversed(range(self.table.shape[1])):
            place[np.arange(len(self.table)), _index(self.table[:, level])] = level
        return [np.take_along_axis(place, _index(q).reshape(len(self.table), -1), axis=1).reshape(-1)]

    def integers(self, digits: Sequence[Array]) -> Array:
        """Return the int8 rows `(rows, columns)` of planes of digits."""
        shape = (self.rows, self.columns)
        if self.table is not None:
            return np.take_along_axis(self.table, digits[0].reshape(len(self.table), -1), axis=1).reshape(shape)
        whole = np.zeros(self.count, np.int16)
        for k, plane in enumerate(digits):
            whole |= plane.astype(np.int16) << LOW * k
        # The highest bit counts below zero.
        return (whole - (whole >> self.bits - 1 << self.bits)).astype(np.int8).reshape(shape)


@dataclass(frozen=True, eq=False)
class Layout:
    """How the rows of a weight are stored.

    Args:
        parts: at least one.
        order: unsigned integers, row of the weight -> its place among the rows of all parts; None for one part.

    Raises:
        OptionError: several parts without an order.
    """

    parts: tuple[Part, ...]
    order: Array | None = None

    def __post_init__(self) -> None:
        if (self.order is None) != (len(self.parts) == 1):
            raise OptionError(f"{len(self.parts)} parts need {'an' if self.order is None else 'no'} order of rows")

    @cached_property
    def bytes(self) -> int:
        """All that is stored."""
        return sum(part.bytes for part in self.parts) + (0 if self.order is None else self.order.nbytes)

    def split(self, q: Array) -> Iterator[tuple[Part, Array]]:
        """Yield each part with its rows of a weight `(rows, columns)`."""
        stacked, start = q if self.order is None else q[np.argsort(self.order)], 0
        for part in self.parts:
            yield part, stacked[start : start + part.rows]
            start += part.rows


def layout_of(q: Array) -> Layout:
    """Return the form of fewest bytes for the rows of a weight.

    Tried are: one width for all rows; tables of at most 16 levels for all rows together, for each row, and for 2, 4, 8,
    ... rows; and parts of rows, each row in the form that is shortest for it. Nodes that a file needs to put parts
    together count as well, 100 bytes each time.

    Args:
        q: int8 `(rows, columns)`, at least one of each.

    Raises:
        OptionError: another type or shape.
    """
    if q.dtype != np.int8 or q.ndim != 2 or not q.size:
        raise OptionError(f"weights are packed as int8 rows (channels, inputs), not {q.dtype} of shape {q.shape}")
    seen = np.zeros((len(q), SPAN), bool)
    for row, found in zip(_index(q).astype(np.intp), seen, strict=True):
        found[row] = True
    widths = _widths(seen)
    # Integers as they are, too: a symbol of 12 bits may be more than a few weights of 8.
    alone = [Layout((Part(len(q), q.shape[1], bits),)) for bits in (int(widths.max()), 8)]
    tried = [*alone, *_with_tables(q, seen), *_by_rows(q, seen, widths)]
    return min(tried, key=lambda layout: layout.bytes + JOIN * _joins(layout))


def packed_bytes(q: Array) -> int:
    """Return the bytes of int8 rows `(rows, columns)` in their shortest form; see `layout_of`."""
    return layout_of(q).bytes


@dataclass(frozen=True, eq=False)
class Packed:
    """The rows of a weight in their shortest form.

    Args:
        layout: what the bytes mean.
        data: the bytes of each part: its planes in turn, each as its code has it; integers of 8 bits as they are.
    """

    layout: Layout
    data: tuple[tuple[Array, ...], ...]


def pack(q: Array) -> Packed:
    """Return int8 rows `(rows, columns)` in their shortest form.

    Raises:
        OptionError: another type or shape.
    """
    layout = layout_of(q)
    return Packed(layout, tuple(_encoded(part, rows) for part, rows in layout.split(q)))


def unpack(packed: Packed) -> Array:
    """Return the int8 rows `(rows, columns)` that were packed."""
    rows = [_decoded(part, data) for part, data in zip(packed.layout.parts, packed.data, strict=True)]
    return rows[0] if packed.layout.order is None else np.concatenate(rows)[packed.layout.order]


def _encoded(part: Part, rows: Array) -> tuple[Array, ...]:
    if not part.codes:
        return (rows.reshape(-1),)
    planes = zip(part.codes, part.digits(rows), strict=True)
    return tuple(stored for code, digits in planes for stored in code.encode(digits))


def _decoded(part: Part, data: Sequence[Array]) -> Array:
    if not part.codes:
        return data[0].reshape(part.rows, part.columns)
    planes, left = [], list(data)
    for code in part.codes:
        taken = 2 if code.bits == 12 else 1
        planes.append(code.decode(left[:taken], part.count))
        left = left[taken:]
    return part.integers(planes)


def _index(q: Array) -> Array:
    """Return `q + 128` of int8 integers as uint8."""
    return np.ascontiguousarray(q).view(np.uint8) ^ np.uint8(SPAN // 2)


def _widths(seen: Array) -> Array:
    """Return the bits of the integers that are seen in each row, 1..8."""
    lowest, highest = seen.argmax(axis=1) - SPAN // 2, SPAN // 2 - 1 - seen[:, ::-1].argmax(axis=1)
    reach = np.maximum(np.maximum(highest, -1 - lowest), 0)
    widths: Array = 1 + np.ceil(np.log2(reach + 1.0)).astype(np.int64)
    return widths


def _tables(seen: Array) -> Array:
    """Return the sorted levels of each row of `seen`, (tables, 256), filled up with the largest."""
    counts = seen.sum(axis=1)
    first = np.argsort(~seen, axis=1, kind="stable")[:, : counts.max()]
    places = np.minimum(np.arange(first.shape[1]), counts[:, None] - 1)
    return (np.take_along_axis(first, places, axis=1) - SPAN // 2).astype(np.int8)


def _with_tables(q: Array, seen: Array) -> Iterator[Layout]:
    """Yield the forms with tables for all rows."""
    (rows, columns), each = q.shape, 1
    while True:
        united = np.logical_or.reduce(seen.reshape(rows // each, each, SPAN), axis=1)
        if united.sum(axis=1).max() > MOST_LEVELS:
            return
        yield Layout((Part(rows, columns, table=_tables(united)),))
        if each == rows:
            return
        # Then twice as many rows for each table, and at last all of them.
        each = 2 * each if rows % (2 * each) == 0 else rows


def _by_rows(q: Array, seen: Array, widths: Array) -> Iterator[Layout]:
    """Yield the form with several parts, where there is a shorter one than each alone."""
    levels, columns = seen.sum(axis=1), q.shape[1]
    # Columns of `costs`: integers of 1..8 bits, then a table for each row with each code.
    integers = [np.where(widths <= bits, columns * bits / 8, np.inf) for bits in range(1, 9)]
    indices = [np.where(levels <= c.levels, columns * c.width / 8 + c.levels, np.inf) for c in CODES]
    costs = np.stack([*integers, *indices], axis=1)
    place = np.min_scalar_type(len(q) - 1)
    chosen = [int(costs.sum(axis=0).argmin())]
    while True:
        best = costs[:, chosen].min(axis=1)
        saved = np.maximum(best[:, None] - costs, 0.0).sum(axis=0)
        price = JOIN + (len(q) * place.itemsize if len(chosen) == 1 else 0)
        if saved.max() <= price:
            break
        chosen.append(int(saved.argmax()))
    form = np.array(chosen)[costs[:, chosen].argmin(axis=1)]
    parts, stacked = [], []
    for one in np.unique(form):
        rows = np.flatnonzero(form == one)
        stacked.append(rows)
        table = None if one < 8 else _tables(seen[rows])
        parts.append(Part(len(rows), columns, 0 if one >= 8 else int(one) + 1, table))
    if len(parts) > 1:
        yield Layout(tuple(parts), np.argsort(np.concatenate(stacked)).astype(place))


def _joins(layout: Layout) -> int:
    """Return how often a file needs nodes to put the weight together."""
    return len(layout.parts) - 1 + sum(part.table is not None and len(part.table) > 1 for part in layout.parts)
