"""The weight of an integer layer: packed in what is saved and exported, int8 where kernels read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.core.errors import LoweringError
from fxquant.core.storage import Layout, Packed, Part, pack, unpack


@dataclass(frozen=True, eq=False)
class PackedTensors:
    """An int8 weight in its shortest form, as tensors and numbers that an op of PyTorch can be given.

    Args:
        tensors: of each part its planes, then its tables if it has any; at last the order of rows if there are parts.
        form: number of axes, their sizes, and for each part its rows, bits, tables and levels of a table.

    Raises:
        LoweringError: a form that describes no weight.
    """

    tensors: tuple[Tensor, ...]
    form: tuple[int, ...]

    def __post_init__(self) -> None:
        axes = self.form[0] if self.form else 0
        if axes < 1 or len(self.form) <= axes or (len(self.form) - 1 - axes) % 4 or not self.tensors:
            raise LoweringError(f"{self.form} is no form of a packed weight; make it with PackedTensors.of")

    @staticmethod
    def of(weight: Tensor) -> PackedTensors:
        """Return a weight of at least two axes, the first of which counts channels, in its shortest form."""
        packed, tensors, form = pack(weight.reshape(len(weight), -1).numpy()), list[Tensor](), [weight.dim()]
        form += weight.shape
        for part, data in zip(packed.layout.parts, packed.data, strict=True):
            table = [] if part.table is None else [part.table]
            tensors += [torch.from_numpy(array) for array in (*data, *table)]
            form += [part.rows, part.bits, *(part.table.shape if part.table is not None else (0, 0))]
        if packed.layout.order is not None:
            tensors.append(torch.from_numpy(packed.layout.order))
        return PackedTensors(tuple(tensors), tuple(form))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.form[1 : 1 + self.form[0]]

    def weight(self) -> Tensor:
        """Return the int8 weight; it shares memory with what is stored in bytes."""
        left, parts, data = list(self.tensors), list[Part](), list[tuple[Any, ...]]()
        columns, described = prod(self.shape[1:]), self.form[1 + self.form[0] :]
        for rows, bits, tables, levels in zip(*(iter(described),) * 4, strict=True):
            table = torch.zeros(tables, levels, dtype=torch.int8).numpy() if tables else None
            count = sum(1 if code.bits == 8 else 2 for code in Part(rows, columns, bits, table).codes) or 1
            taken, left = left[: count + bool(tables)], left[count + bool(tables) :]
            parts.append(Part(rows, columns, bits, taken[-1].numpy() if tables else None))
            data.append(tuple(tensor.numpy() for tensor in taken[:count]))
        if len(parts) == 1 and parts[0].bits == 8:
            # Not a view of it, which would keep alive what caches look up weakly.
            return self.tensors[0].data.view(self.shape)
        layout = Layout(tuple(parts), left[0].numpy() if left else None)
        return torch.from_numpy(unpack(Packed(layout, tuple(data)))).view(self.shape)


class PackedLayer(nn.Module):
    """A layer whose state dict, pickle and exported program hold its weight in the shortest form."""

    weight: Tensor
    form: tuple[int, ...]

    def keep(self, weight: Tensor) -> None:
        """Take an int8 weight, channels first."""
        packed = PackedTensors.of(weight)
        self.form = packed.form
        for index, tensor in enumerate(packed.tensors):
            self.register_buffer(f"weight{index}", tensor)
        # A plain attribute: nothing saves it.
        self.weight = self.packed.weight()

    @property
    def packed(self) -> PackedTensors:
        """The weight as it is saved."""
        count = sum(name.startswith("weight") and name[6:].isdigit() for name in self._buffers)
        return PackedTensors(tuple(self.get_buffer(f"weight{index}") for index in range(count)), self.form)

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
        # Another tensor, for what was prepared from the old one is looked up by it.
        self.weight = self.packed.weight()
        self.prepare()


def unpacked(tensors: Sequence[Tensor], form: Sequence[int]) -> Tensor:
    """Return the int8 weight of packed tensors and their form."""
    return PackedTensors(tuple(tensors), tuple(form)).weight()
