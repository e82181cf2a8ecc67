"""What a random graph is drawn from: one row per op, each with how its options are drawn and what module computes it.

Options are plain values, so that a drawn graph can be printed and read back. Whether they suit the shape is found out
by running them: what torch refuses is not drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_layers import ACTIVATIONS, Attention, Call, Offset, Squeeze, TokensFirst

Options = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One row.

    Args:
        draw: (source of chance, shapes of the operands with the batch in front) -> options, None where it cannot be.
        build: (options, shapes) -> module.
        operands: tensors it takes.
        ranks: ranks its first operand may have.
        weight: how often it is drawn, against the others.
    """

    draw: Callable[[Random, Sequence[Shape]], Options | None]
    build: Callable[[Options, Sequence[Shape]], nn.Module]
    operands: int = 1
    ranks: tuple[int, ...] = (2, 3, 4)
    weight: int = 2


def one_of(chance: Random, *values: Any) -> Any:
    """Return one of the values; the first ones are the simple ones."""
    return values[chance.randrange(len(values))]


def _none(chance: Random, shapes: Sequence[Shape]) -> Options:
    del chance, shapes
    return {}


def plain(function: Callable[..., Any], **row: Any) -> Op:
    """Return the row of a function without options."""
    return Op(_none, lambda *_: Call(function), **row)


def _divisors(*numbers: int) -> list[int]:
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]


def _conv_options(chance: Random, shapes: Sequence[Shape]) -> Options:
    channels, axes = shapes[0][1], len(shapes[0]) - 2
    depthwise = chance.randrange(4) == 3
    out = channels * one_of(chance, 1, 2) if depthwise else one_of(chance, 4, 8, 3, 5, 6, 1)
    groups = channels if depthwise else one_of(chance, 1, 1, *_divisors(channels, out))
    mode = one_of(chance, "zeros", "zeros", "zeros", "zeros", "circular", "reflect", "replicate")
    strided = chance.randrange(3) == 2
    padding: Any = [one_of(chance, 0, 1, 2) for _ in range(axes)]
    if not strided and chance.randrange(4) == 3:
        padding = "same"
    return {
        "out": out,
        "kernel": [one_of(chance, 1, 3, 2) for _ in range(axes)],
        "stride": [one_of(chance, 2, 1, 3) for _ in range(axes)] if strided else [1] * axes,
        "padding": padding,
        "dilation": [one_of(chance, 1, 2) for _ in range(axes)] if chance.randrange(4) == 3 else [1] * axes,
        "groups": groups,
        "bias": chance.randrange(4) > 0,
        "mode": mode,
    }


def _conv(options: Options, shapes: Sequence[Shape]) -> nn.Module:
    kind: Any = nn.Conv1d if len(shapes[0]) == 3 else nn.Conv2d
    padding = options["padding"]
    made: nn.Module = kind(
        shapes[0][1],
        options["out"],
        tuple(options["kernel"]),
        stride=tuple(options["stride"]),
        padding=padding if isinstance(padding, str) else tuple(padding),
        dilation=tuple(options["dilation"]),
        groups=options["groups"],
        bias=options["bias"],
        padding_mode=options["mode"],
    )
    return made


def _transposed(options: Options, shapes: Sequence[Shape]) -> nn.Module:
    kind: Any = nn.ConvTranspose1d if len(shapes[0]) == 3 else nn.ConvTranspose2d
    made: nn.Module = kind(shapes[0][1], options["out"], 2, stride=options["stride"])
    return made


def _norm_of_rank(options: Options, shapes: Sequence[Shape]) -> nn.Module:
    kind: Any = nn.BatchNorm2d if len(shapes[0]) == 4 else nn.BatchNorm1d
    norm: nn.Module = kind(shapes[0][1], affine=options["affine"])
    return norm


def _layer_norm_options(chance: Random, shapes: Sequence[Shape]) -> Options | None:
    axes = 1 if len(shapes[0]) == 2 else one_of(chance, 1, 2)
    return _norm_of(prod(shapes[0][-axes:]), {"axes": axes, "affine": chance.randrange(3) > 0})


def _group_options(chance: Random, shapes: Sequence[Shape]) -> Options | None:
    groups = one_of(chance, *_divisors(shapes[0][1]))
    return _norm_of(prod(shapes[0][1:]) // groups, {"groups": groups})


def _norm_of(values: int, options: Options) -> Options | None:
    # Of one value nothing is left but the rounding of its mean, of two their signs.
    return options if values > 2 else None


def _attention_options(chance: Random, shapes: Sequence[Shape]) -> Options | None:
    heads = [h for h in (1, 2, 4) if shapes[0][2] % h == 0]
    return {"heads": one_of(chance, *heads), "way": one_of(chance, "by hand", "unbind", "index")}


def _pool_options(chance: Random, shapes: Sequence[Shape]) -> Options:
    axes = len(shapes[0]) - 2
    kernel = [one_of(chance, 2, 3, 1) for _ in range(axes)]
    return {
        "kernel": kernel,
        "stride": one_of(chance, None, [1] * axes, [2] * axes, [3] * axes),
        "padding": [one_of(chance, 0, 1) if k > 1 else 0 for k in kernel],
        "ceil": chance.randrange(3) == 2,
    }


def _max_options(chance: Random, shapes: Sequence[Shape]) -> Options:
    return {**_pool_options(chance, shapes), "dilation": one_of(chance, 1, 1, 1, 2)}


def _average_options(chance: Random, shapes: Sequence[Shape]) -> Options:
    return {
        **_pool_options(chance, shapes),
        "counts": chance.randrange(2) == 0,
        "divisor": one_of(chance, *[None] * 7, 3),
    }


def _max_pool(options: Options, shapes: Sequence[Shape]) -> nn.Module:
    kind: Any = nn.MaxPool1d if len(shapes[0]) == 3 else nn.MaxPool2d
    o = options
    made: nn.Module = kind(o["kernel"], o["stride"], o["padding"], o["dilation"], ceil_mode=o["ceil"])
    return made


def _average_pool(options: Options, shapes: Sequence[Shape]) -> nn.Module:
    o = options
    if len(shapes[0]) == 3:
        return nn.AvgPool1d(o["kernel"][0], o["stride"], o["padding"][0], o["ceil"], o["counts"])
    return nn.AvgPool2d(o["kernel"], o["stride"], o["padding"], o["ceil"], o["counts"], o["divisor"])


def _adaptive_options(chance: Random, _: Sequence[Shape]) -> Options:
    return {"size": one_of(chance, 1, 2, [1, 2], 3), "kind": one_of(chance, "average", "average", "max")}


def _adaptive_pool(options: Options, _: Sequence[Shape]) -> nn.Module:
    size = options["size"] if isinstance(options["size"], int) else tuple(options["size"])
    return nn.AdaptiveAvgPool2d(size) if options["kind"] == "average" else nn.AdaptiveMaxPool2d(size)


def _mean_options(chance: Random, shapes: Sequence[Shape]) -> Options:
    rank = len(shapes[0])
    axes = one_of(chance, [2, 3], [-1, -2], [1], [-1], [2]) if rank == 4 else one_of(chance, [1], [-1])
    # Everything but the images must not be lost.
    keep = chance.randrange(2) == 1 or rank - len(axes) < 2
    return {"axes": axes, "keep": keep, "way": one_of(chance, "mean", "mean", "mean", "amax", "sum")}


def _mean(options: Options, _: Sequence[Shape]) -> nn.Module:
    function: Any = {"mean": torch.mean, "amax": torch.amax, "sum": torch.sum}[options["way"]]
    return Call(lambda x: function(x, dim=options["axes"], keepdim=options["keep"]))


def _pad_options(chance: Random, shapes: Sequence[Shape]) -> Options:
    axes = chance.randrange(1, len(shapes[0]) - 1)
    mode = one_of(chance, "constant", "constant", "constant", "reflect", "circular", "replicate")
    if mode != "constant":
        axes = len(shapes[0]) - 2
    widths = [one_of(chance, 0, 1, 2, *([-1] if mode == "constant" else [])) for _ in range(2 * axes)]
    return {"widths": widths, "mode": mode, "value": one_of(chance, 0.0, 0.0, 0.0, 1.5) if mode == "constant" else None}


def _pad(options: Options, _: Sequence[Shape]) -> nn.Module:
    return Call(lambda x: F.pad(x, options["widths"], options["mode"], options["value"]))


def _binary_options(chance: Random, _: Sequence[Shape]) -> Options:
    return {"way": one_of(chance, "add", "add", "add", "mul", "sub", "alpha", "iadd", "max")}


def _binary(options: Options, _: Sequence[Shape]) -> nn.Module:
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": lambda a, b: a + b,
        "mul": lambda a, b: a * b,
        "sub": lambda a, b: a - b,
        "alpha": lambda a, b: torch.add(a, b, alpha=0.5),
        "iadd": lambda a, b: a.clone().add_(b),
        "max": torch.maximum,
    }
    return Call(ways[options["way"]])


def _scalar_options(chance: Random, _: Sequence[Shape]) -> Options:
    return {"way": one_of(chance, "add", "mul", "rsub", "div", "pow", "neg"), "value": one_of(chance, 2, 0.5, -1.5, 3)}


def _scalar(options: Options, _: Sequence[Shape]) -> nn.Module:
    value = options["value"]
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "add": lambda x: x + value,
        "mul": lambda x: x * value,
        "rsub": lambda x: value - x,
        "div": lambda x: x / value,
        "pow": lambda x: x**2,
        "neg": lambda x: -x,
    }
    return Call(ways[options["way"]])


def _axis_options(chance: Random, shapes: Sequence[Shape]) -> Options:
    axis = chance.randrange(1, len(shapes[0]))
    return {"axis": axis if chance.randrange(2) == 0 else axis - len(shapes[0])}


def _cat(options: Options, _: Sequence[Shape]) -> nn.Module:
    return Call(lambda *parts: torch.cat(parts, dim=options["axis"]))


def _split_options(chance: Random, shapes: Sequence[Shape]) -> Options | None:
    axis = chance.randrange(1, len(shapes[0]))
    size = shapes[0][axis]
    if size < 2:
        return None
    return {
        "axis": axis,
        "way": one_of(chance, "chunk", "split", "narrow", "select", "index", "step", "last"),
        "at": chance.randrange(1, size),
    }


def _split(options: Options, shapes: Sequence[Shape]) -> nn.Module:
    axis, at, size = options["axis"], options["at"], shapes[0][options["axis"]]
    ways: dict[str, Callable[[Tensor], Any]] = {
        "chunk": lambda x: torch.chunk(x, 2, dim=axis),
        "split": lambda x: torch.split(x, [at, size - at], dim=axis),
        "narrow": lambda x: torch.narrow(x, axis, at, size - at),
        "select": lambda x: x.select(axis, at),
        "index": lambda x: torch.index_select(x, axis, torch.tensor([at, 0])),
        "step": lambda x: x[(slice(None),) * axis + (slice(None, None, 2),)],
        "last": lambda x: x[(slice(None),) * axis + (slice(-at, None),)],
    }
    return Call(ways[options["way"]])


def _shape_options(chance: Random, shapes: Sequence[Shape]) -> Options:
    rank = len(shapes[0])
    ways = ["flatten", "unsqueeze", "transpose"]
    ways += (
        ["permute", "tokens", "shuffle", "image"]
        if rank == 4
        else ["as_image", "last_first"]
        if rank == 3
        else ["as_map"]
    )
    return {"way": one_of(chance, *ways)}


def _shape(options: Options, _: Sequence[Shape]) -> nn.Module:
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "flatten": lambda x: torch.flatten(x, 1),
        "unsqueeze": lambda x: x.unsqueeze(1) if x.dim() < 4 else x.squeeze(2),
        "transpose": lambda x: x.transpose(-1, -2) if x.dim() > 2 else x[:, None, :].squeeze(1),
        "permute": lambda x: x.permute(0, 2, 3, 1),
        "tokens": lambda x: x.flatten(2).transpose(1, 2),
        "shuffle": lambda x: x.view(x.shape[0], -1, 2, x.shape[2], x.shape[3]).transpose(1, 2).reshape(x.shape),
        "image": lambda x: x.permute(0, 3, 1, 2).contiguous(),
        "as_image": lambda x: x.reshape(x.shape[0], x.shape[1], -1, 1),
        "last_first": lambda x: x.permute(0, 2, 1).contiguous().view(x.shape[0], x.shape[2], x.shape[1]),
        "as_map": lambda x: x.view(x.shape[0], -1, 1, 1),
    }
    return Call(ways[options["way"]])


def _interpolate_options(chance: Random, _: Sequence[Shape]) -> Options:
    return {"mode": one_of(chance, "nearest", "bilinear"), "factor": one_of(chance, 2, 1.5), "shuffle": False}


def _interpolate(options: Options, _: Sequence[Shape]) -> nn.Module:
    return nn.Upsample(scale_factor=options["factor"], mode=options["mode"])


def _activation_options(chance: Random, _: Sequence[Shape]) -> Options:
    return {"name": one_of(chance, *ACTIVATIONS)}


def _pointwise(options: Options, _: Sequence[Shape]) -> nn.Module:
    return Call(ACTIVATIONS[options["name"]])


CATALOGUE: dict[str, Op] = {
    "conv": Op(_conv_options, _conv, ranks=(3, 4), weight=16),
    "linear": Op(
        lambda chance, _: {"out": one_of(chance, 4, 8, 3, 1), "bias": chance.randrange(4) > 0},
        lambda o, shapes: nn.Linear(shapes[0][-1], o["out"], bias=o["bias"]),
        weight=8,
    ),
    "batch_norm": Op(lambda chance, _: {"affine": chance.randrange(4) > 0}, _norm_of_rank, weight=5),
    "activation": Op(_activation_options, _pointwise, weight=12),
    "relu": plain(torch.relu, weight=5),
    "max_pool": Op(_max_options, _max_pool, ranks=(3, 4), weight=3),
    "average_pool": Op(_average_options, _average_pool, ranks=(3, 4), weight=3),
    "adaptive_pool": Op(_adaptive_options, _adaptive_pool, ranks=(4,)),
    "mean": Op(_mean_options, _mean, ranks=(3, 4)),
    "pad": Op(_pad_options, _pad, ranks=(3, 4), weight=3),
    "binary": Op(_binary_options, _binary, operands=2, weight=9),
    "scalar": Op(_scalar_options, _scalar),
    "offset": Op(
        lambda chance, _: {"way": one_of(chance, "add", "mul")},
        lambda o, shapes: Offset(shapes[0][1], len(shapes[0]), o["way"]),
    ),
    "cat": Op(_axis_options, _cat, operands=2, weight=5),
    "cat3": Op(_axis_options, _cat, operands=3, weight=1),
    "split": Op(_split_options, _split, weight=4),
    "shape": Op(_shape_options, _shape, weight=5),
    "channels_last": plain(lambda x: x.contiguous(memory_format=torch.channels_last), ranks=(4,), weight=1),
    "layer_norm": Op(
        _layer_norm_options, lambda o, shapes: nn.LayerNorm(shapes[0][-o["axes"] :], elementwise_affine=o["affine"])
    ),
    "group_norm": Op(_group_options, lambda o, shapes: nn.GroupNorm(o["groups"], shapes[0][1]), ranks=(3, 4), weight=1),
    "softmax": Op(_axis_options, lambda o, _: Call(lambda x: torch.softmax(x, dim=o["axis"])), weight=1),
    "attention": Op(_attention_options, lambda o, shapes: Attention(shapes[0][2], o["heads"], o["way"]), ranks=(3,)),
    "tokens_first": Op(_none, lambda _, shapes: TokensFirst(shapes[0][2]), ranks=(3,), weight=1),
    "squeeze_excite": Op(
        lambda chance, _: {"gate": one_of(chance, "sigmoid", "hard")},
        lambda o, shapes: Squeeze(shapes[0][1], o["gate"]),
        ranks=(4,),
    ),
    "matmul": plain(lambda a, b: a @ b.transpose(-1, -2), operands=2, ranks=(3, 4)),
    "interpolate": Op(_interpolate_options, _interpolate, ranks=(4,), weight=1),
    "pixel_shuffle": plain(lambda x: F.pixel_shuffle(x, 2), ranks=(4,), weight=1),
    "transposed_conv": Op(
        lambda chance, _: {"out": one_of(chance, 4, 3), "stride": one_of(chance, 1, 2)},
        _transposed,
        ranks=(3, 4),
        weight=1,
    ),
    "cumsum": Op(_axis_options, lambda o, _: Call(lambda x: torch.cumsum(x, dim=o["axis"])), weight=1),
    "expand": plain(lambda x: x.unsqueeze(1).expand(-1, 2, *[-1] * (x.dim() - 1)), ranks=(2, 3), weight=1),
}
"""Name -> row."""
