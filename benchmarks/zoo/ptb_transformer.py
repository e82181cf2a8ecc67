"""A language model of the Penn Treebank: two pre-norm Transformer blocks of width 192, one table at both ends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.weights import loaded

WORDS = 10_000
CONTEXT = 128
_WIDTH = 192
_HEADS = 4


class CausalBlock(nn.Module):
    """Attention to the words before and an MLP, both on normalised values and with a residual, `(N, T, 192)`."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.qkv, self.proj = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.fc1, self.fc2 = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        count, steps, width = x.shape
        query, key, value = (
            part.view(count, steps, _HEADS, width // _HEADS).transpose(1, 2)
            for part in self.qkv(self.n1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(count, steps, width))
        y: Tensor = x + self.fc2(F.gelu(self.fc1(self.n2(x))))
        return y


class PtbTransformer(nn.Module):
    """Words `(N, T)`, T up to 128, to logits `(N, T, 10000)`."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(WORDS, _WIDTH)
        self.pos = nn.Parameter(torch.zeros(CONTEXT, _WIDTH))
        self.blocks = nn.Sequential(CausalBlock(), CausalBlock())
        self.norm = nn.LayerNorm(_WIDTH)
        self.bias = nn.Parameter(torch.zeros(WORDS))

    def forward(self, words: Tensor) -> Tensor:
        x = self.emb(words) + self.pos[: words.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.emb.weight, self.bias)


def ptb_transformer() -> PtbTransformer:
    """Return the trained network."""
    return loaded(PtbTransformer(), "language_models/ptb_transformer_2x192_fp16.npz")
