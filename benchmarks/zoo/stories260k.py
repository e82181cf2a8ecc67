"""stories260K, a Llama of 260,000 parameters that tells children's stories (Karpathy, llama2.c).

Five blocks of width 64, rotary positions, 8 heads of which two share a key and a value, RMS norms, SwiGLU, one table
at both ends.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import data_file
from fxquant.core.errors import FileFormatError

WORDS = 512
CONTEXT = 512
_WIDTH, _INNER, _DEPTH, _HEADS, _KEYS = 64, 172, 5, 8, 4
_HEAD = _WIDTH // _HEADS
_FILE = "tiny_lm/stories260K.bin"


class Rms(nn.Module):
    """`x / sqrt(mean(x^2) + 1e-5)` times a weight for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(_WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads `(N, T, heads, 8)` with neighbouring channels turned by their position's angles."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class LlamaBlock(nn.Module):
    """Attention to the words before and a gated MLP, `(N, T, 64)`."""

    def __init__(self) -> None:
        super().__init__()
        self.att_norm, self.ffn_norm = Rms(), Rms()
        self.wq, self.wo = nn.Linear(_WIDTH, _WIDTH, bias=False), nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.wk = nn.Linear(_WIDTH, _KEYS * _HEAD, bias=False)
        self.wv = nn.Linear(_WIDTH, _KEYS * _HEAD, bias=False)
        self.w1, self.w3 = nn.Linear(_WIDTH, _INNER, bias=False), nn.Linear(_WIDTH, _INNER, bias=False)
        self.w2 = nn.Linear(_INNER, _WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        count, steps, _ = x.shape
        y = self.att_norm(x)
        query = _turned(self.wq(y).view(count, steps, _HEADS, _HEAD), cos, sin)
        key = _turned(self.wk(y).view(count, steps, _KEYS, _HEAD), cos, sin)
        value = self.wv(y).view(count, steps, _KEYS, _HEAD)
        key, value = (part.repeat_interleave(_HEADS // _KEYS, dim=2) for part in (key, value))
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        weights = (query @ key.transpose(-2, -1) / _HEAD**0.5 + mask).softmax(-1)
        x = x + self.wo((weights @ value).transpose(1, 2).reshape(count, steps, _WIDTH))
        y = self.ffn_norm(x)
        answer: Tensor = x + self.w2(F.silu(self.w1(y)) * self.w3(y))
        return answer


class Stories(nn.Module):
    """Words `(N, T)`, T up to 512, to logits `(N, T, 512)`."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(WORDS, _WIDTH)
        self.blocks = nn.ModuleList(LlamaBlock() for _ in range(_DEPTH))
        self.norm = Rms()
        angle = torch.outer(torch.arange(CONTEXT).float(), 10_000.0 ** (-torch.arange(0, _HEAD, 2) / _HEAD))
        self.register_buffer("cos", angle.cos().unsqueeze(1), persistent=False)
        self.register_buffer("sin", angle.sin().unsqueeze(1), persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        steps = words.shape[1]
        cos, sin = self.cos[:steps], self.sin[:steps]
        mask = torch.full((steps, steps), float("-inf")).triu(1)
        x = self.emb(words)
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return F.linear(self.norm(x), self.emb.weight)


_ORDER = ("att_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")
"""The file holds each of these for all blocks, one after the other."""


def stories260k() -> Stories:
    """Return the trained network.

    Raises:
        FileFormatError: the file is missing, or describes another network.
    """
    raw = data_file(_FILE).read_bytes()
    header = np.frombuffer(raw, "<i4", 7).tolist()
    if header != [_WIDTH, _INNER, _DEPTH, _HEADS, _KEYS, WORDS, CONTEXT]:
        raise FileFormatError(f"{_FILE} begins with {header}: another network than this definition")
    numbers = torch.from_numpy(np.frombuffer(raw, "<f4", offset=28).copy())
    model, start = Stories(), 0
    parts = [model.emb, *(getattr(block, name) for name in _ORDER for block in model.blocks), model.norm]
    with torch.no_grad():
        for part in parts:
            size = part.weight.numel()
            _ = part.weight.copy_(numbers[start : start + size].view_as(part.weight))
            start += size
    return model.eval()
