"""Weights of float ops in a lowered graph: packed in what is saved and exported, float where the op reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.backends.int8.custom_ops import unpack_op
from fxquant.backends.int8.packed_layer import PackedLayer
from fxquant.backends.int8.rules import integers_of
from fxquant.core.ir import FakeQuantize, constant, is_constant


def weight_quantizer(module: GraphModule, node: object) -> FakeQuantize | None:
    """Return what quantizes a parameter at this node of a simulated graph, None for any other node."""
    source = node.args[0] if isinstance(node, Node) and node.op == "call_module" and node.args else None
    if not isinstance(node, Node) or not is_constant(source):
        return None
    fake = module.get_submodule(str(node.target))
    return fake if isinstance(fake, FakeQuantize) else None


def stored(module: GraphModule, node: object, kind: Callable[[Tensor, Tensor], PackedLayer]) -> PackedLayer:
    """Return what holds the weight that is quantized at this node of a simulated graph."""
    fake = weight_quantizer(module, node)
    assert fake is not None
    assert isinstance(node, Node)
    weight = constant(module, node.args[0])
    assert weight is not None
    return kind(*integers_of(fake, weight))


class StoredWeight(PackedLayer):
    """Returns a float weight, `integers x scale of their row`.

    Args:
        weight: int8, of at least two axes.
        scales: float32, one for each index of the first axis.
    """

    scales: Tensor

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.keep(weight)
        self.register_buffer("scales", scales)
        self._real: Tensor | None = None

    def prepare(self) -> None:
        """Forget the float weight."""
        self._real = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_real": None}

    def forward(self) -> Tensor:
        """Return the weight as float32."""
        compiling = torch.compiler.is_compiling()
        if self._real is not None and not compiling:
            return self._real
        whole = whole_weight(self)
        real = whole.float() * self.scales.view(-1, *[1] * (whole.dim() - 1))
        self._real = None if compiling else real
        return real


class StoredTable(PackedLayer):
    """An embedding that looks up int8 rows and makes floats of those alone.

    Args:
        weight: int8 `(rows, columns)`.
        scales: float32 `(rows,)`.
    """

    scales: Tensor

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.keep(weight)
        self.register_buffer("scales", scales)

    def forward(self, index: Tensor) -> Tensor:
        """Return the rows `(*index.shape, columns)` as float32."""
        rows = F.embedding(index, whole_weight(self))
        return rows.float() * F.embedding(index, self.scales.unsqueeze(1))


def whole_weight(layer: PackedLayer) -> Tensor:
    """Return a layer's int8 weight; in an exported program, what unpacks it."""
    return unpack_op(layer.packed, layer.form) if torch.compiler.is_exporting() else layer.weight
