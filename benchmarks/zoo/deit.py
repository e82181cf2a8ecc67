"""DeiT-tiny, patch 16 (Touvron et al. 2021), with attention as two explicit matrix products.

Keys are timm's. Weights: float32, except that the LayerNorm gains and biases were rounded by the source.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.weights import loaded

_WIDTH = 192
_HEADS = 3
_DEPTH = 12
_TOKENS = 197
_EPS = 1e-6


class PatchEmbedding(nn.Module):
    """Cut `(N, 3, 224, 224)` into 196 patches and embed each, `(N, 196, 192)`."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, _WIDTH, 16, stride=16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, tokens `(N, T, 192)` in and out (Vaswani et al. 2017, eq. 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.proj = nn.Linear(_WIDTH, _WIDTH)
        self.scale = (_WIDTH // _HEADS) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, _HEADS, width // _HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        weights = (query @ key.transpose(-2, -1) * self.scale).softmax(-1)
        mixed: Tensor = self.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, width))
        return mixed


class Mlp(nn.Module):
    """Two linear layers with exact GELU between, four times as wide inside."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(_WIDTH, 4 * _WIDTH)
        self.fc2 = nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class EncoderBlock(nn.Module):
    """Pre-normalised attention and MLP, each with its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(_WIDTH, eps=_EPS)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(_WIDTH, eps=_EPS)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class DeiT(nn.Module):
    """Twelve encoder blocks over a class token and 196 patches, `(N, 3, 224, 224)` to logits `(N, 1000)`."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, _WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, _TOKENS, _WIDTH))
        self.patch_embed = PatchEmbedding()
        self.blocks = nn.Sequential(*(EncoderBlock() for _ in range(_DEPTH)))
        self.norm = nn.LayerNorm(_WIDTH, eps=_EPS)
        self.head = nn.Linear(_WIDTH, 1000)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x)
        tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), patches), 1) + self.pos_embed
        normed = self.norm(self.blocks(tokens))
        logits: Tensor = self.head(normed[:, 0])
        return logits


def deit_tiny() -> DeiT:
    """Return the trained network."""
    return loaded(DeiT(), "imagenet_weights/deit_tiny_patch16_224_fp32.npz")
