"""Perplexity of language models, `exp(mean over words of -log p(word | the words before it))`, and the texts."""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data import read_arrays
from fxquant.core.errors import OptionError

Stateful = Callable[..., tuple[Tensor, ...]]
"""(words (N, T), *states) -> (logits (N, T, V), *states behind)."""


def treebank(split: Literal["valid", "train"]) -> Tensor:
    """Return words of the Penn Treebank as int64: the validation text, 73,760 words, or 200,000 to train with.

    Raises:
        FileFormatError: the data are missing.
        OptionError: `split` is neither "valid" nor "train".
    """
    if split not in ("valid", "train"):
        raise OptionError(f"unknown Penn Treebank split {split!r}; allowed: 'valid', 'train'")
    arrays = read_arrays("language_models/ptb.npz")
    if split == "train":
        packed = lzma.decompress(arrays["train_lzma"].tobytes())
        return torch.from_numpy(np.frombuffer(packed, np.uint16).astype(np.int64))
    return torch.from_numpy(arrays["valid"].astype(np.int64))


def told_stories() -> Tensor:
    """Return 256 texts of 256 words `(256, 256)` that stories260K wrote.

    Raises:
        FileFormatError: the data are missing.
    """
    return torch.from_numpy(read_arrays("tiny_lm/selfgen_256x256.npz")["tokens"].astype(np.int64))


def streamed(
    model: Stateful, states: Callable[[int], tuple[Tensor, ...]], text: Tensor, streams: int = 10, steps: int = 35
) -> float:
    """Return the perplexity of a model with states, which reads `streams` parts of the text side by side.

    Args:
        model: float, or what a runtime makes of it.
        states: number of parts -> the states in front of them.
        text: words.
        streams: number of parts.
        steps: words of a call; a rest of fewer words is left out.
    """
    length = (len(text) - streams) // streams // steps * steps
    rows = text[: len(text) // streams * streams].view(streams, -1)
    total, carried = 0.0, states(streams)
    with torch.inference_mode():
        for start in range(0, length, steps):
            logits, *rest = model(rows[:, start : start + steps], *carried)
            carried = tuple(rest)
            total += _nats(logits, rows[:, start + 1 : start + steps + 1])
    return math.exp(total / (length * streams))


def in_blocks(
    model: Callable[[Tensor], Tensor], text: Tensor, context: int = 128, scored: int = 64, batch: int = 8
) -> float:
    """Return the perplexity of a model without states, which sees `context` words and is asked for the last ones.

    Args:
        model: words `(N, T)` to logits `(N, T, V)`.
        text: words, or rows of words that are read apart, `(rows, context + 1)`.
        context: words of a call.
        scored: of them, those whose next word counts.
        batch: calls side by side.
    """
    blocks = text.unfold(0, context + 1, scored) if text.dim() == 1 else text
    total, count = 0.0, 0
    with torch.inference_mode():
        for part in torch.split(blocks, batch):
            target = part[:, 1:][:, -scored:]
            total += _nats(model(part[:, :-1])[:, -scored:], target)
            count += target.numel()
    return math.exp(total / count)


def _nats(logits: Tensor, words: Tensor) -> float:
    return float(F.cross_entropy(logits.reshape(-1, logits.shape[-1]).double(), words.reshape(-1), reduction="sum"))
