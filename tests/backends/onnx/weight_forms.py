"""Integers of every form a weight is stored in, and a network whose layers have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.capture import capture
from fxquant.core.ir import FakeQuantize, fork
from fxquant.passes import Canonicalize, FoldBatchnorm
from tests.backends.lowered import calibrated, plan_of

Rows = NDArray[np.int8]
Fill = Callable[[int, int, int], Rows]
"""Rows, columns and seed in, int8 rows out."""


def drawn(rows: int, columns: int, seed: int, levels: Sequence[int]) -> Rows:
    """Return rows of these levels, all of which occur where there is room."""
    q = np.random.default_rng(seed).choice(np.array(levels, np.int8), (rows, columns))
    q.flat[: len(levels)] = np.array(levels, np.int8)[: q.size]
    return q


def uniform(bits: int) -> Fill:
    """Return integers of one width."""
    return lambda rows, columns, seed: drawn(rows, columns, seed, range(-(1 << bits - 1), 1 << bits - 1))


def layer_table(levels: int) -> Fill:
    """Return so many levels for all rows."""
    return lambda rows, columns, seed: drawn(rows, columns, seed, [k * 13 - 100 for k in range(levels)])


def row_tables(levels: int, each: int = 1) -> Fill:
    """Return so many levels for every row, or every few rows."""

    def fill(rows: int, columns: int, seed: int) -> Rows:
        tables = [[(row // each * 37 + k * 29) % 256 - 128 for k in range(levels)] for row in range(rows)]
        return np.concatenate([drawn(1, columns, seed + row, sorted(table)) for row, table in enumerate(tables)])

    return fill


def mixed(rows: int, columns: int, seed: int) -> Rows:
    """Return rows of several widths, and some with tables of their own."""
    kinds = [uniform(2), uniform(4), row_tables(3), uniform(3), uniform(8)]
    return np.concatenate([kinds[row % len(kinds)](1, columns, seed + row) for row in range(rows)])


FORMS: dict[str, Fill] = {f"{bits} bits": uniform(bits) for bits in range(1, 9)}
FORMS |= {f"{levels} levels": layer_table(levels) for levels in (2, 3, 4, 5, 6, 7, 8, 9, 16)}
FORMS |= {f"{levels} levels a row": row_tables(levels) for levels in (2, 3, 4, 5, 6, 8, 12, 16)}
FORMS |= {"4 levels for 8 rows": row_tables(4, 8), "rows of several widths": mixed}
OF_EACH_KIND = (
    *("1 bits", "3 bits", "4 bits", "6 bits", "7 bits", "8 bits"),
    *("5 levels", "7 levels", "4 levels a row", "8 levels a row", "12 levels a row", "rows of several widths"),
)
"""One form for each way of unpacking."""


class _Net(nn.Module):
    """Convolutions of all kinds, and linear layers of two and three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(48, 64, 3, padding=1)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.point = nn.Conv2d(64, 90, 1)
        self.tokens = nn.Linear(90, 71)
        self.head = nn.Linear(71, 33)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.deep(torch.relu(self.stem(x))))))
        x = torch.relu(self.point(x))
        answer: Tensor = self.head(torch.relu(self.tokens(x.flatten(2).transpose(1, 2))).mean(1))
        return answer


@cache
def _simulated() -> GraphModule:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    program = FoldBatchnorm()(Canonicalize()(capture(_Net().eval(), (images[:2],))))
    return plan_of(calibrated(program, (images,), widths=(8,)), (8,))


def with_integers(fill: Fill) -> tuple[GraphModule, dict[str, Rows]]:
    """Return the simulated network with these integers for weights, and them as rows by layer."""
    module, found = fork(_simulated()), dict[str, Rows]()
    for node in module.graph.nodes:
        fake = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(fake, FakeQuantize) and fake.spec.channel_axis == 0:
            path = str(node.args[0].target)
            weight = module.get_parameter(path)
            q = fill(len(weight), weight[0].numel(), len(found))
            found[path.removesuffix(".weight")] = q
            scale = fake.scale.reshape(-1, 1)
            weight.data = (torch.from_numpy(q) * scale).reshape(weight.shape)
    return module, found
