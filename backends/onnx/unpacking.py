"""Operators that unpack weights; a runtime carries them out once, when it loads the file.

What was tried, in nanoseconds of loading for each weight (onnxruntime 1.31; reading int8 takes 1.2): symbols of a byte
looked up in a table of 256 rows take 1.5 for one bit and 2.9 for two, types of 4 bits with a Cast 2.5; shifts and masks
take 5, Where 13. OpenVINO folds Cast, Gather, Add, Reshape, Concat, Split and Slice, but no bitwise operator, no
GatherElements and no Transpose. So integers of up to 3 bits and indices are symbols in a table, 4 bits have a type, and
5 to 7 bits are the sum of both. Tables of symbols would be a kilobyte each; the file makes them from a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
from onnx import TensorProto

from fxquant.backends.onnx.builder import Array, GraphBuilder
from fxquant.core.storage import Code, Part, code_for

FOUR_BITS = code_for(16)
"""Digits that ONNX has types for."""


class Unpacking:
    """Writes the operators that turn stored digits into int8 values.

    Args:
        builder: takes nodes and constants.
        folds_all: whether the runtime folds GatherElements, the fastest way to look up tables for several rows, and
            BitwiseOr, which older ONNX Runtimes have for int8; otherwise Add and Gather take their place.
    """

    def __init__(self, builder: GraphBuilder, folds_all: bool) -> None:
        self.builder, self.folds_all = builder, folds_all
        self._made: dict[object, str] = {}

    def integers(self, part: Part, planes: Sequence[Array], counts: Sequence[int]) -> list[str]:
        """Return the int8 values of integers of one width, or with one table for all, in pieces.

        Args:
            part: their form.
            planes: their digits.
            counts: integers in each piece; a piece has any shape.
        """
        if part.bits == 4:
            whole = len(planes[0])
            return self._pieces(self._cast(self._typed(planes[0], True, (whole,))), counts, whole)
        code, top = part.codes[-1], planes[-1]
        if part.table is None:
            # The highest digits count from the lower half of their range up to -1.
            steps = np.arange(code.levels, dtype=np.int16) << part.bits - code.levels.bit_length() + 1
            levels = np.where(steps >> part.bits - 1, steps - (1 << part.bits), steps).astype(np.int8)
        else:
            levels = part.table[0]
        value, shape = self._looked_up(code, top, levels)
        if len(planes) == 2:
            low = self._cast(self._typed(planes[0], False, shape))
            value = self._node("BitwiseOr" if self.folds_all else "Add", low, value)
        return self._pieces(value, counts, prod(shape))

    def of_four_bits(self, digits: Array, shape: Sequence[int], output: str) -> None:
        """Write the int8 value of integers of 4 bits in a shape, under a name that is reserved for it."""
        self._node("Cast", self._typed(digits, True, shape), output=output, to=TensorProto.INT8)

    def in_tables(self, tables: Array, digits: Array) -> str:
        """Return the int8 values `(tables, integers)` of indices into tables of their own.

        Args:
            tables: int8 `(tables, levels)`.
            digits: flat, those of the first table first.
        """
        count, levels = tables.shape
        shape, code = (count, len(digits) // count), code_for(levels)
        if self._pays_symbol_by_symbol(code, shape):
            return self._symbols_in_tables(code, tables, digits)
        if code == FOUR_BITS:
            index = self._cast(self._typed(digits, False, shape), TensorProto.INT32)
        else:
            value, padded = self._looked_up(code, digits, np.arange(code.levels, dtype=np.int8))
            (value,) = self._pieces(value, [len(digits)], prod(padded))
            index = self._cast(self.reshaped(value, shape), TensorProto.INT32)
        if self.folds_all:
            return self._node("GatherElements", self._constant(tables, "tables"), index, axis=1)
        starts = self._column(self._range(count * levels, levels))
        return self._node("Gather", self._constant(tables.reshape(-1), "tables"), self._node("Add", index, starts))

    def _pays_symbol_by_symbol(self, code: Code, shape: Sequence[int]) -> bool:
        """Whether tables of whole symbols are smaller than the index of each integer that they save."""
        whole = code.bits == 8 and shape[1] % code.per == 0
        return self.folds_all and whole and code != FOUR_BITS and (code.per << 8) <= shape[1]

    def _symbols_in_tables(self, code: Code, tables: Array, digits: Array) -> str:
        """Return int8 values `(tables, symbols, per)`, each symbol looked up as a whole."""
        fill = np.repeat(tables[:, -1:], code.levels - tables.shape[1], axis=1)
        known = self._constant(np.concatenate([tables, fill], axis=1), "tables")
        symbols = self._node("Gather", known, self._digits(code), axis=1)
        (low,) = code.encode(digits)
        index = self._cast(self._constant(low.reshape(len(tables), -1, 1), "packed"), TensorProto.INT64)
        return self._node("GatherND", symbols, index, batch_dims=1)

    def rows_of(self, value: str, counts: Sequence[int]) -> list[str]:
        """Return a value cut along its first axis."""
        return self._split(value, counts) if len(counts) > 1 else [value]

    def reshaped(self, value: str, shape: Sequence[int], output: str | None = None) -> str:
        """Return a value in a shape, under a name that is reserved for it if one is given."""
        # Weights of several layers differ in one axis; with that left open they share the constant.
        known = [size if axis != 1 else -1 for axis, size in enumerate(shape)]
        return self._node("Reshape", value, self._constant(np.array(known, np.int64), "shape"), output=output)

    def _looked_up(self, code: Code, digits: Array, levels: Array) -> tuple[str, tuple[int, ...]]:
        """Return int8 levels of digits, filled up to whole symbols, and their shape."""
        pairs = code.bits == 12
        filled = np.concatenate([digits, np.zeros(-len(digits) % (code.per * (2 if pairs else 1)), np.uint8)])
        low, *upper = code.encode(filled)
        index = self._cast(self._constant(low.reshape(-1, 2) if pairs else low, "packed"), TensorProto.INT32)
        if pairs:
            halves = self._once("halves", lambda: self._node("Mul", self._digits(FOUR_BITS), self._number(256)))
            add = self._node("Gather", halves, self._cast(self._constant(upper[0], "packed"), TensorProto.INT32))
            index = self._node("Add", index, add)
        value = self._node("Gather", self._symbols(code, levels), index)
        return value, (*((len(upper[0]), 2) if pairs else (len(low),)), code.per)

    def _symbols(self, code: Code, levels: Array) -> str:
        """Return the int8 levels of each symbol, `(2^bits, per)`."""
        # Symbols that do not occur must find a level as well.
        full = np.concatenate([levels, np.repeat(levels[-1:], code.levels - len(levels))])
        key = (code, full.tobytes())
        return self._once(key, lambda: self._node("Gather", self._constant(full, "levels"), self._digits(code)))

    def _digits(self, code: Code) -> str:
        """Return the digits of each symbol, int32 `(2^bits, per)`."""

        def made() -> str:
            symbols = self._column(self._range(1 << code.bits, 1))
            parts = self._node("Div", symbols, self._constant(code.factors.astype(np.int32), "factors"))
            return self._node("Mod", parts, self._number(code.levels))

        return self._once(code, made)

    def _range(self, end: int, step: int) -> str:
        """Return `0, step, 2 step, ...` below `end`, int32."""
        numbers = [self._number(number) for number in (0, end, step)]
        return self._once(("range", end, step), lambda: self._node("Range", *numbers))

    def _column(self, value: str) -> str:
        axis = self._constant(np.array([1], np.int64), "axis")
        return self._once(("column", value), lambda: self._node("Unsqueeze", value, axis))

    def _pieces(self, value: str, counts: Sequence[int], whole: int) -> list[str]:
        """Return a value in pieces; what is left over at its end is dropped."""
        if list(counts) == [whole]:
            return [value]
        flat = self._node("Reshape", value, self._constant(np.array([-1], np.int64), "flat"))
        rest = whole - sum(counts)
        return self._split(flat, [*counts, *([rest] if rest else [])])[: len(counts)]

    def _split(self, value: str, counts: Sequence[int]) -> list[str]:
        outputs = [self.builder.unique("piece") for _ in counts]
        sizes = self._constant(np.array(counts, np.int64), "sizes")
        self.builder.emit("Split", [value, sizes], outputs)
        return outputs

    def _typed(self, digits: Array, signed: bool, shape: Sequence[int]) -> str:
        """Return a constant of 4 bits, filled up with zeros."""
        filled = np.concatenate([digits, np.zeros(prod(shape) - len(digits), np.uint8)])
        kind = TensorProto.INT4 if signed else TensorProto.UINT4
        return self.builder.packed(filled, kind, shape, "packed")

    def _cast(self, value: str, kind: int = TensorProto.INT8) -> str:
        return self._node("Cast", value, to=kind)

    def _number(self, value: int) -> str:
        return self._constant(np.array(value, np.int32), f"i{value}")

    def _constant(self, array: Array, name: str) -> str:
        return self.builder.constant(array, name)

    def _node(self, op: str, *inputs: str, output: str | None = None, **attributes: int) -> str:
        result = self.builder.unique("unpacked") if output is None else output
        self.builder.emit(op, inputs, [result], "", **attributes)
        return result

    def _once(self, key: object, make: Callable[[], str]) -> str:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
