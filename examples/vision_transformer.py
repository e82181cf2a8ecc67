"""A vision transformer: attention and layer norms stay in float, linear layers get 4 or 8 bits, accuracy is the limit.

python examples/vision_transformer.py [folder]: a tiny one with random weights; a minute.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm and beside a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        answer: Tensor = x + self.mlp(self.norm2(x))
        return answer


class VisionTransformer(nn.Module):
    """Patches of 8 pixels, a class token, positions, blocks, a classifier."""

    def __init__(self, width: int = 48, depth: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(Block(width, 3) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores of the classes."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


def main(folder: Path) -> fxquant.Result:
    """Find the smallest model that answers like the float one on 90 % of images, and write its report."""
    torch.manual_seed(0)
    model = VisionTransformer().eval()
    images = torch.randn(96, 3, 32, 32)
    # Without labels the share of changed answers bounds the loss of accuracy; half of the images judge it.
    budget = fxquant.Budget(disagreement=0.1)
    result = fxquant.quantize(model, images, budget, bits=(4, 8), effort="fast", progress=False)
    print(result.summary())
    result.report(folder / "report.html")
    result.to_onnx(folder / "model.onnx")
    print(f"written to {folder}: report.html and model.onnx")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
