"""DS-CNN keyword spotter of the MLPerf Tiny benchmark (Zhang et al. 2017), BatchNorm folded.

Weights: mlcommons/tiny (Apache-2.0).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.padding import PaddedConv2d
from benchmarks.zoo.weights import loaded

_WIDTH = 64
# SAME padding of a 10x4 kernel at stride 2 on 49x10: nine rows and two columns, the odd row below.
_STEM_PAD = (1, 1, 4, 5)


class DsCnn(nn.Module):
    """Four depthwise-separable blocks, MFCC maps `(N, 1, 49, 10)` to logits `(N, 12)`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = PaddedConv2d(1, _WIDTH, (10, 4), _STEM_PAD, stride=2)
        for index in range(1, 5):
            self.add_module(f"dw{index}", nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, groups=_WIDTH))
            self.add_module(f"pw{index}", nn.Conv2d(_WIDTH, _WIDTH, 1))
        self.fc = nn.Linear(_WIDTH, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for index in range(1, 5):
            x = F.relu(self.get_submodule(f"dw{index}")(x))
            x = F.relu(self.get_submodule(f"pw{index}")(x))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def dscnn() -> DsCnn:
    """Return the trained network."""
    return loaded(DsCnn(), "mlperf_tiny/dscnn_kws.npz")
