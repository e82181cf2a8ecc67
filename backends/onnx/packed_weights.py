"""The weights of one ONNX graph in their shortest form.

Small weights of one form share an initializer and the operators that unpack it: in a file of twenty small layers each
layer's own would take as many bytes as narrower weights save.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from fxquant.backends.onnx.builder import Array, GraphBuilder
from fxquant.backends.onnx.unpacking import Unpacking
from fxquant.core.storage import Part, layout_of

SMALL = 1 << 16
"""Integers up to which a part of a weight is unpacked together with others; more would be copied for nothing."""


@dataclass(frozen=True)
class _Member:
    """One part of a weight among others of its form.

    Args:
        part: its form.
        planes: its digits, for each plane in turn.
        value: name of the int8 value to be made.
        shape: of that value.
    """

    part: Part
    planes: list[Array]
    value: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Joined:
    """A weight that is put together: rows from several parts in their order, channels moved to their axis.

    Args:
        value: name of the int8 value to be made.
        parts: names of the rows of each part, channels first.
        order: row -> place among the rows of all parts; None for one part.
        axes: of the weight.
        axis: where the channels belong.
    """

    value: str
    parts: tuple[str, ...]
    order: Array | None
    axes: int
    axis: int


class PackedWeights:
    """Collects the weights of a graph while it is written, and puts what makes them in front of it.

    Args:
        builder: takes nodes and constants.
        folds_all: whether the runtime folds more than OpenVINO does, see `Unpacking`; where it does not, what would
            have to be transposed is stored as int8.
    """

    def __init__(self, builder: GraphBuilder, folds_all: bool = True) -> None:
        self.builder, self.transposes = builder, folds_all
        self.unpacking = Unpacking(builder, folds_all)
        self._forms: dict[object, list[_Member]] = {}
        self._joined: list[_Joined] = []
        self._known: dict[object, str] = {}

    def add(self, weight: Array, axis: int, name: str) -> tuple[str, bool]:
        """Return the name of a value with these integers, and whether the file holds them in their shortest form.

        Args:
            weight: int8.
            axis: that counts the channels, whose integers are the rows that are packed.
            name: for what is made.
        """
        moved = np.moveaxis(weight, axis, 0)
        rows = np.ascontiguousarray(moved).reshape(len(moved), -1)
        layout = layout_of(rows)
        first = layout.parts[0]
        # In one form for all, the order of the integers does not matter.
        alike = len(layout.parts) == 1 and (first.table is None or len(first.table) == 1)
        plain = alike and not first.codes
        if plain or (axis != 0 and not alike and not self.transposes):
            return self.builder.constant(weight, name), plain
        key = (weight.shape, axis, weight.tobytes())
        if key not in self._known:
            value = self._known[key] = self.builder.unique(name)
            if alike:
                self._collect(first, np.ascontiguousarray(weight), value, weight.shape)
            elif len(layout.parts) == 1 and axis == 0:
                self._collect(first, rows, value, weight.shape)
            else:
                each = moved.shape[1:]
                parts = [self._part(p, some, (p.rows, *each), f"{name}_part") for p, some in layout.split(rows)]
                self._joined.append(_Joined(value, tuple(parts), layout.order, moved.ndim, axis))
        return self._known[key], True

    def write(self) -> None:
        """Write what makes the values in front of all nodes that are there."""
        later, self.builder.nodes = self.builder.nodes, []
        for members in self._forms.values():
            self._unpack(members)
        for joined in self._joined:
            self._join(joined)
        self.builder.nodes += later

    def _part(self, part: Part, rows: Array, shape: tuple[int, ...], name: str) -> str:
        if not part.codes:
            return self.builder.constant(rows.reshape(shape), name)
        value = self.builder.unique(name)
        self._collect(part, rows, value, shape)
        return value

    def _collect(self, part: Part, q: Array, value: str, shape: tuple[int, ...]) -> None:
        form: object = part.bits
        if part.table is not None:
            # Tables for rows of one length are one table; a table for all rows is looked up with the digits.
            alone = len(part.table) == 1
            form = part.table.tobytes() if alone else (part.table.shape[1], part.count // len(part.table))
        key = (form, value) if part.count > SMALL else (form,)
        self._forms.setdefault(key, []).append(_Member(part, part.digits(q), value, shape))

    def _unpack(self, members: list[_Member]) -> None:
        """Write the nodes of all members of one form."""
        part, unpacking = members[0].part, self.unpacking
        planes = [np.concatenate(plane) for plane in zip(*(m.planes for m in members), strict=True)]
        if part.bits == 4 and len(members) == 1:
            unpacking.of_four_bits(planes[0], members[0].shape, members[0].value)
            return
        if part.table is None or len(part.table) == 1:
            pieces = unpacking.integers(part, planes, [member.part.count for member in members])
        else:
            tables = [member.part.table for member in members if member.part.table is not None]
            whole = unpacking.in_tables(np.concatenate(tables), planes[0])
            pieces = unpacking.rows_of(whole, [len(table) for table in tables])
        for member, piece in zip(members, pieces, strict=True):
            unpacking.reshaped(piece, member.shape, member.value)

    def _join(self, joined: _Joined) -> None:
        value, builder, axis = joined.parts[0], self.builder, joined.axis
        if joined.order is not None:
            stacked = builder.node("Concat", joined.parts, "rows", axis=0)
            order = builder.node("Cast", [builder.constant(joined.order, "order")], "order", to=TensorProto.INT32)
            value = joined.value if axis == 0 else builder.unique("rows")
            builder.emit("Gather", [stacked, order], [value])
        if axis != 0:
            back = [*range(1, axis + 1), 0, *range(axis + 1, joined.axes)]
            builder.emit("Transpose", [value], [joined.value], perm=back)
