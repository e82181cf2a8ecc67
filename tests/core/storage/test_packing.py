"""Weights in their shortest form: what comes back, and how many bytes it takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fxquant.core.errors import OptionError
from fxquant.core.storage import CODES, Code, Layout, Part, code_for, layout_of, pack, packed_bytes, unpack

Rows = NDArray[np.int8]


def random(rows: int, columns: int, levels: list[int], seed: int = 0) -> Rows:
    return np.random.default_rng(seed).choice(np.array(levels, np.int8), (rows, columns))


def uniform(bits: int) -> list[int]:
    return list(range(-(1 << bits - 1), 1 << bits - 1))


@st.composite
def weights(draw: st.DrawFn) -> Rows:
    """Rows of up to three kinds, each with levels of its own or of a width."""
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 40))
    level = st.integers(-128, 127)
    kinds = st.one_of(st.integers(1, 8).map(uniform), st.lists(level, min_size=1, max_size=20))
    allowed = draw(st.lists(kinds, min_size=1, max_size=3))
    made = [random(1, columns, allowed[row % len(allowed)], draw(st.integers(0, 9)) + row) for row in range(rows)]
    return np.concatenate(made)


@given(weights())
def test_what_is_unpacked_is_what_was_packed(q: Rows) -> None:
    packed = pack(q)
    assert np.array_equal(unpack(packed), q)
    stored = sum(array.nbytes for data in packed.data for array in data)
    tables = sum(part.table.nbytes for part in packed.layout.parts if part.table is not None)
    order = 0 if packed.layout.order is None else packed.layout.order.nbytes
    assert packed_bytes(q) == packed.layout.bytes == stored + tables + order <= q.size


@pytest.mark.parametrize("bits", range(1, 9))
def test_each_width_takes_its_bits(bits: int) -> None:
    q = random(64, 90, uniform(bits))
    part = layout_of(q).parts[0]
    assert (part.bits, part.table) == (bits, None)
    assert packed_bytes(q) == 64 * 90 * bits // 8


@pytest.mark.parametrize(("levels", "bits"), [(2, 1.0), (3, 1.6), (4, 2.0), (5, 2.4), (6, 8 / 3), (8, 3.0), (16, 4.0)])
def test_a_table_for_the_layer_takes_as_few_bits_as_its_levels_need(levels: int, bits: float) -> None:
    q = random(64, 90, [k * 12 - 100 for k in range(levels)])
    assert [len(part.table) for part in layout_of(q).parts if part.table is not None] == [1]
    assert packed_bytes(q) == 64 * 90 * bits / 8 + levels


def test_tables_are_for_as_many_rows_as_is_cheapest() -> None:
    each = [random(1, 500, [-90 + row, -20, row, 90 - row], row) for row in range(16)]
    tables = [part.table for part in layout_of(np.concatenate(each)).parts]
    assert tables[0] is not None
    assert tables[0].shape == (16, 4)
    by_four = [random(4, 500, [-90 + row, -20, 3 * row + 1, 90 - row], row) for row in range(8)]
    tables = [part.table for part in layout_of(np.concatenate(by_four)).parts]
    assert tables[0] is not None
    assert tables[0].shape == (8, 4)
    assert tables[0][5].tolist() == [-85, -20, 16, 85]


def test_rows_of_one_width_are_stored_together_and_come_back_in_their_places() -> None:
    widths = [2, 4, 4, 2, 8, 3] * 8
    q = np.concatenate([random(1, 400, uniform(bits), row) for row, bits in enumerate(widths)])
    layout = layout_of(q)
    assert [(part.bits, part.rows) for part in layout.parts] == [(2, 16), (3, 8), (4, 16), (8, 8)]
    assert layout.bytes == sum(400 * bits // 8 for bits in widths) + len(widths)
    assert np.array_equal(unpack(pack(q)), q)


def test_a_few_wide_rows_are_not_worth_a_part_of_their_own() -> None:
    q = random(32, 8, uniform(3))
    q[5] = random(1, 8, uniform(8))
    assert len(layout_of(q).parts) == 1
    wide = np.concatenate([random(200, 300, uniform(3)), random(1, 300, uniform(8))])
    assert [part.bits for part in layout_of(wide).parts] == [3, 8]
    # From 256 rows on their places take two bytes each.
    assert packed_bytes(wide) == 200 * 300 * 3 // 8 + 300 + 201
    assert packed_bytes(np.concatenate([wide, wide])) == 2 * (200 * 300 * 3 // 8 + 300) + 402 * 2


def test_a_row_of_nine_weights_takes_no_table_of_its_own() -> None:
    q = random(64, 9, list(range(-128, 128, 16)))
    assert all(part.table is None or len(part.table) == 1 for part in layout_of(q).parts)
    spread = np.random.default_rng(0).integers(-128, 128, (64, 9)).astype(np.int8)
    assert packed_bytes(spread) == spread.size


def test_symbols_have_their_first_digit_lowest() -> None:
    assert [array.tolist() for array in Code(4, 4, 8).encode(np.array([1, 2, 3, 0, 2], np.uint8))] == [[57, 2]]
    low, upper = Code(8, 4, 12).encode(np.array([7, 7, 7, 7, 1, 0, 0, 4, 0, 0, 0, 1], np.uint8))
    assert (low.tolist(), upper.tolist()) == ([255, 1, 0], [0x8F, 2])
    assert [code.width for code in CODES] == sorted(code.width for code in CODES)
    assert code_for(7) == code_for(8) == Code(8, 4, 12)


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(OptionError, match=r"int8 rows .* not float32 of shape \(2, 3\)"):
        packed_bytes(np.zeros((2, 3), np.float32))
    with pytest.raises(OptionError, match="3 digits below 7 do not fit a symbol of 8 bits"):
        Code(7, 3, 8)
    with pytest.raises(OptionError, match="0 bits are no part"):
        Part(4, 4, 0)
    with pytest.raises(OptionError, match="no part"):
        Part(3, 4, 0, np.zeros((2, 4), np.int8))
    with pytest.raises(OptionError, match="2 parts need an order"):
        Layout((Part(1, 1, 8), Part(1, 1, 2)))
