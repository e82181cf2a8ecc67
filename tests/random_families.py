"""Random networks of the families that recipes of single calls do not form: design, model, and how they are drawn.

Several inputs, answers of every layout and type, free sizes, transposed, 3-d and recurrent layers, gates, parts that
are joined again, tied and computed weights. A design is plain data: its `repr` is Python that makes it again, which
is what a failing case prints.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_blocks import WIDTH as W
from tests.random_blocks import AlongTime, AsVolume, Cell, Computed, First, Parts, Products, Residual, Twice
from tests.random_layers import Attention, Call, Squeeze

CLASSES = 6
WORDS = 11
"""Rows of an embedding."""
Pair = namedtuple("Pair", "first second")


@dataclass(frozen=True)
class Design:
    """A random network.

    Args:
        kind: "image" of shape (N, 3, H, W), "sequence" of shape (N, T, 8), or "tokens", integers of shape (N, T).
        sizes: H and W, or T.
        inputs: how many; they are added after a first layer, which they share where `tied` says so.
        tied: whether inputs share their first layer, and the last layer of tokens the embedding's weight.
        layers: names of rows of `LAYERS`.
        answers: names of rows of `ANSWERS`.
        layout: name of a row of `LAYOUTS`.
        free: whether the file is to run at other sizes.
        exported_first: whether the ONNX file is written before the result is saved.
        seed: of weights and images.
    """

    kind: str
    sizes: tuple[int, ...]
    inputs: int
    tied: bool
    layers: tuple[str, ...]
    answers: tuple[str, ...]
    layout: str
    free: bool = False
    exported_first: bool = False
    seed: int = 0


def _padded(x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    return F.avg_pool2d(F.pad(x, (0, -width % 4, 0, -height % 4)), 3, 1, 1)[:, :, :height, :width]


IMAGE: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(W, W, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(W, W, 3, padding=1, groups=W, bias=False),
    "strided": lambda: nn.Sequential(nn.Conv2d(W, W, 3, 2, 1), nn.BatchNorm2d(W), nn.ReLU()),
    "conv twice": lambda: Twice(nn.Conv2d(W, W, 3, padding=1)),
    "residual": lambda: Residual(nn.Conv2d(W, W, 3, padding=1)),
    "transposed": lambda: nn.ConvTranspose2d(W, W, 2, 2),
    "transposed 3": lambda: nn.ConvTranspose2d(W, W, 3, 2, 1, output_padding=1),
    "transposed groups": lambda: nn.ConvTranspose2d(W, W, 4, 2, 1, groups=2, bias=False),
    "transposed uneven": lambda: nn.ConvTranspose2d(W, W, (3, 2), (1, 2), (1, 0)),
    "transposed dilated": lambda: nn.ConvTranspose2d(W, W, 3, 1, 2, dilation=2),
    "volume": lambda: AsVolume(nn.Conv3d(W // 2, W // 2, 3, padding=1)),
    "volume depthwise": lambda: AsVolume(nn.Conv3d(W // 2, W // 2, (3, 1, 1), padding=(1, 0, 0), groups=W // 2)),
    "transposed twice": lambda: Twice(nn.ConvTranspose2d(W, W, 3, padding=1)),
    "gain": lambda: Computed("gain", W, W, 3, 3),
    "standardized": lambda: Computed("standardized", W, W, 3, 3),
    "normalized": lambda: Computed("normalized", W, W, 3, 3),
    "volume max": lambda: AsVolume(nn.MaxPool3d((3, 3, 3), (1, 2, 2), 1, ceil_mode=True)),
    "volume average": lambda: AsVolume(nn.AvgPool3d((1, 2, 2), (1, 1, 1))),
    "volume adaptive": lambda: AsVolume(nn.AdaptiveAvgPool3d((2, 3, 4))),
    "volume mean": lambda: AsVolume(Residual(nn.AdaptiveAvgPool3d(1))),
    "squeeze": lambda: Squeeze(W, "hard"),
    "squeeze sigmoid": lambda: Squeeze(W, "sigmoid"),
    "expanded": lambda: nn.Sequential(
        nn.Conv2d(W, W, 3, padding=1, groups=W), nn.BatchNorm2d(W), nn.SiLU(), Squeeze(W, "sigmoid"), nn.Conv2d(W, W, 1)
    ),
    "silu": lambda: nn.SiLU(),
    "conv silu": lambda: nn.Sequential(nn.Conv2d(W, W, 3, padding=1), nn.SiLU()),
    "chunk": lambda: Parts("chunk", nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU())),
    "split": lambda: Parts("split", nn.Conv2d(4, 4, 3, padding=1)),
    "shuffle": lambda: Parts("shuffle", nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())),
    "group norm": lambda: nn.GroupNorm(2, W),
    "instance norm": lambda: nn.InstanceNorm2d(W, affine=True),
    "prelu": lambda: nn.PReLU(W),
    "leaky": lambda: nn.LeakyReLU(0.1),
    "hardswish": lambda: nn.Hardswish(),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "max pool": lambda: nn.MaxPool2d(3, 2, 1),
    "affine": lambda: nn.Sequential(nn.Conv2d(W, W, 3, padding=1), nn.ReLU(), Call(lambda x: x * 1.3 - 0.2)),
    "turned clip": lambda: nn.Sequential(nn.Conv2d(W, W, 1), nn.ReLU6(), Call(lambda x: 0.5 - x), nn.Conv2d(W, W, 1)),
    "small residual": lambda: Residual(nn.Sequential(nn.Conv2d(W, W, 3, padding=1), Call(lambda x: x * 0.1))),
    "clip": lambda: nn.Sequential(nn.Conv2d(W, W, 1), nn.Hardtanh(-0.5, 0.7)),
    "padded": lambda: Call(_padded),
    "branch of means": lambda: Call(
        lambda x: x + F.interpolate(F.adaptive_avg_pool2d(x, 2), size=x.shape[-2:], mode="nearest")
    ),
}
SEQUENCE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(W, W),
    "linear twice": lambda: Twice(nn.Linear(W, W)),
    "residual": lambda: Residual(nn.Linear(W, W)),
    "lstm": lambda: First(nn.LSTM(W, W, batch_first=True)),
    "lstm of two": lambda: First(nn.LSTM(W, W, num_layers=2)),
    "lstm both ways": lambda: First(nn.LSTM(W, W // 2, batch_first=True, bidirectional=True)),
    "gru": lambda: First(nn.GRU(W, W, batch_first=True)),
    "gru both ways": lambda: First(nn.GRU(W, W // 2, bidirectional=True, bias=False)),
    "lstm cell": lambda: Cell(nn.LSTMCell(W, W)),
    "gru cell": lambda: Cell(nn.GRUCell(W, W)),
    "conv": lambda: AlongTime(nn.Conv1d(W, W, 3, padding=1)),
    "transposed": lambda: AlongTime(nn.ConvTranspose1d(W, W, 2, 2)),
    "bilinear": lambda: Products("bilinear"),
    "baddbmm": lambda: Products("baddbmm"),
    "einsum": lambda: Products("einsum"),
    "attention": lambda: Attention(W, 2, "unbind"),
    "gain": lambda: Computed("gain", W, W),
    "normalized": lambda: Computed("normalized", W, W),
    "layer norm": lambda: nn.LayerNorm(W),
    "gelu": lambda: nn.GELU(),
    "silu": lambda: Call(F.silu),
}
LAYERS = {"image": IMAGE, "sequence": SEQUENCE, "tokens": SEQUENCE}
"""Kind -> name -> what makes the layer; shapes (N, 8, H, W) or (N, T, 8)."""
ANSWERS: dict[str, Callable[[Tensor], Tensor]] = {
    "values": lambda y: y,
    "classes": lambda y: y.argmax(1 if y.dim() == 4 else 2),
    "flags": lambda y: y > 0,
    "bytes": lambda y: (y.sigmoid() * 255).round().to(torch.uint8),
    "images second": lambda y: y.transpose(0, 1),
    "images last": lambda y: y.movedim(0, -1),
    "means": lambda y: y.mean((2, 3)) if y.dim() == 4 else y.mean(1),
    "softmax": lambda y: y.softmax(1 if y.dim() == 4 else 2),
    "best": lambda y: y.amax(1 if y.dim() == 4 else 2),
    "stacked": lambda y: torch.stack([y, y.relu()]),
}
"""Name -> function of a head's scores, (N, 6, H, W) or (N, T, 6)."""
LAYOUTS: dict[str, Callable[[list[Tensor]], Any]] = {
    "tensor": lambda made: made[0],
    "tuple": tuple,
    "list": list,
    "dict": lambda made: {f"answer {k}": value for k, value in enumerate(made)},
    "nested": lambda made: {"head": made[0], "more": (made[-1], [made[0]])},
    "named": lambda made: Pair(made[0], made[-1]),
}


class Family(nn.Module):
    """The network of a design."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.design = design
        image = design.kind == "image"
        entry: dict[str, Callable[[], nn.Module]] = {
            "image": lambda: nn.Conv2d(3, W, 3, padding=1),
            "sequence": lambda: nn.Linear(W, W),
            "tokens": lambda: nn.Embedding(WORDS, W),
        }
        self.entries = nn.ModuleList(entry[design.kind]() for _ in range(1 if design.tied else design.inputs))
        self.body = nn.Sequential(*(LAYERS[design.kind][name]() for name in design.layers))
        classes = WORDS if design.kind == "tokens" else CLASSES
        self.heads = nn.ModuleList(
            nn.Conv2d(W, classes, 1) if image else nn.Linear(W, classes, bias=False) for _ in design.answers
        )
        if design.tied and design.kind == "tokens":
            for head in self.heads:
                head.weight = self.entries[0].weight
        self.eval()

    def run(self, *inputs: Tensor) -> Any:
        entries = list(self.entries) * (1 if len(self.entries) > 1 else len(inputs))
        first = [entry(x) for entry, x in zip(entries, inputs, strict=True)]
        y = self.body(first[0] if len(first) == 1 else first[0] + first[1])
        made = [ANSWERS[name](head(y)) for name, head in zip(self.design.answers, self.heads, strict=True)]
        return LAYOUTS[self.design.layout](made)


class OneArgument(Family):
    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class TwoArguments(Family):
    def forward(self, rgb: Tensor, depth: Tensor) -> Any:
        return self.run(rgb, depth)


def family(design: Design) -> Family:
    """Return the network of a design, with seeded weights."""
    with torch.random.fork_rng():
        torch.manual_seed(design.seed)
        return (OneArgument, TwoArguments)[design.inputs - 1](design)


def shown(design: Design, count: int, seed: int = 0, sizes: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
    """Return seeded inputs of a design."""
    source = torch.Generator().manual_seed(design.seed * 10 + seed)
    sizes = design.sizes if sizes is None else sizes
    if design.kind == "tokens":
        return tuple(torch.randint(WORDS, (count, *sizes), generator=source) for _ in range(design.inputs))
    shape = (3, *sizes) if design.kind == "image" else (*sizes, W)
    return tuple(torch.randn(count, *shape, generator=source) for _ in range(design.inputs))


def draw_design(chance: Random) -> Design:
    """Return a random design."""
    kind = chance.choice(("image", "image", "sequence", "tokens"))
    image = kind == "image"
    layout = chance.choice(tuple(LAYOUTS))
    rows = tuple(LAYERS[kind])
    return Design(
        kind,
        chance.choice(((8, 8), (6, 9), (12, 8))) if image else (chance.choice((4, 6)),),
        chance.choice((1, 1, 2)),
        chance.random() < 0.4,
        tuple(chance.choice(rows) for _ in range(chance.randrange(1, 4))),
        tuple(chance.choice(tuple(ANSWERS)) for _ in range(1 if layout == "tensor" else chance.randrange(1, 4))),
        layout,
        image and chance.random() < 0.4,
        chance.random() < 0.5,
        chance.randrange(1000),
    )
