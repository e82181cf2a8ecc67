"""The weight of an integer layer: packed in what is saved and exported, int8 where kernels read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxquant.core.errors import LoweringError
from fxquant.core.storage import Layout, Packed, Part, pack, unpack


def packed_weight(weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return an int8 weight in its shortest form: bytes, and numbers that say what they are.

    Args:
        weight: of at least two axes, the first of which counts channels.

    Returns:
        uint8 vector: of each part its planes, then its tables if it has any; at last the order of rows if there is one.
        And the number of axes, their sizes, and for each part its rows, bits, tables, and levels of a table.
    """
    packed, arrays, form = pack(weight.reshape(len(weight), -1).numpy()), list[Any](), [weight.dim(), *weight.shape]
    for part, data in zip(packed.layout.parts, packed.data, strict=True):
        tables, levels = (0, 0) if part.table is None else part.table.shape
        arrays += [*data, *([] if part.table is None else [part.table])]
        form += [part.rows, part.bits, tables, levels]
    arrays += [] if packed.layout.order is None else [packed.layout.order]
    whole = np.concatenate([np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays])
    return torch.from_numpy(whole), tuple(form)


def unpacked_weight(data: Tensor, form: Sequence[int]) -> Tensor:
    """Return the int8 weight that was packed; integers in bytes share the memory.

    Raises:
        LoweringError: bytes that the form does not describe.
    """
    shape, described = form[1 : 1 + form[0]], form[1 + form[0] :]
    cut = _cutter(data)
    parts, arrays = list[Part](), list[tuple[Any, ...]]()
    for rows, bits, tables, levels in zip(*(iter(described),) * 4, strict=True):
        # The table lies behind the planes, whose sizes its levels say.
        table = np.zeros((tables, levels), np.int8) if tables else None
        planes = tuple(cut(size) for size in Part(rows, prod(shape[1:]), bits, table).sizes)
        table = cut(tables * levels).view(np.int8).reshape(tables, levels) if tables else None
        parts.append(Part(rows, prod(shape[1:]), bits, table))
        arrays.append((planes[0].view(np.int8),) if bits == 8 else planes)
    rows = sum(part.rows for part in parts)
    order = cut(rows * (place := np.min_scalar_type(rows - 1)).itemsize).view(place) if len(parts) > 1 else None
    if len(cut(-1)):
        raise LoweringError(f"{len(data)} bytes are not a weight of the form {tuple(form)}; lower the graph again")
    if len(parts) == 1 and parts[0].bits == 8:
        # Not a view of the tensor, which would keep alive what caches look up weakly.
        return data.data.view(torch.int8).view(*shape)
    return torch.from_numpy(unpack(Packed(Layout(tuple(parts), order), tuple(arrays)))).view(*shape)


def _cutter(data: Tensor) -> Callable[[int], Any]:
    """Return a function that cuts off so many bytes; -1 for all that are left."""
    left = data.numpy()

    def cut(size: int) -> Any:
        nonlocal left
        size = len(left) if size < 0 else size
        found, left = left[:size], left[size:]
        return found

    return cut


class PackedLayer(nn.Module):
    """A layer whose state dict, pickle and exported program hold its weight in the shortest form."""

    packed: Tensor
    weight: Tensor
    form: tuple[int, ...]

    def keep(self, weight: Tensor) -> None:
        """Take an int8 weight, channels first."""
        data, self.form = packed_weight(weight)
        self.register_buffer("packed", data)
        # A plain attribute: nothing saves it.
        self.weight = unpacked_weight(data, self.form)

    def prepare(self) -> None:
        """Make what follows from the weight and is not saved; called whenever the weight was loaded."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self._unpack()

    def __getstate__(self) -> dict[str, Any]:
        lost = self._non_persistent_buffers_set
        kept = {name: tensor for name, tensor in self._buffers.items() if name not in lost}
        return {**{key: value for key, value in self.__dict__.items() if key != "weight"}, "_buffers": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore: Callable[[dict[str, Any]], None] = super().__setstate__
        restore(state)
        self._unpack()

    def _unpack(self) -> None:
        # Another tensor each time, for what was prepared from the old one is looked up by it.
        self.weight = unpacked_weight(self.packed, self.form)
        self.prepare()
