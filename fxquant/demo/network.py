"""The demo network: small to ship, yet with a residual, depthwise layers and kernels that have real work.

About 0.11 million parameters and 40 million multiply-accumulates per image. The stem and the depthwise
layers hold few weights and are fragile, the residual convolutions hold most and are robust: the
contrast that mixed precision lives on.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.core.errors import FileFormatError
from fxquant.core.storage import read_tensors

WEIGHTS = Path(__file__).with_name("digits_net.safetensors")

CLASSES = 10


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around an identity, `(N, width, H, W)` in and out.

    Source: He et al. 2015, eq. 1.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, of the input's shape."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class SeparableBlock(nn.Module):
    """A depthwise 3x3 and a pointwise convolution, `(N, channels, H, W)` to `(N, width, H, W)`.

    Source: Howard et al. 2017, section 3.1.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; height and width stay."""
        x = F.relu(self.bn1(self.depthwise(x)))
        return F.relu(self.bn2(self.pointwise(x)))


class DigitsNet(nn.Module):
    """Handwritten digits `(N, 1, 32, 32)`, normalised by `fxquant.demo.digits`, to logits `(N, 10)`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.separable1 = SeparableBlock(16, 32)
        self.residual1 = ResidualBlock(32)
        self.separable2 = SeparableBlock(32, 64)
        self.residual2 = ResidualBlock(64)
        self.separable3 = SeparableBlock(64, 128)
        self.linear = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(N, 10)`."""
        x = F.relu(self.bn(self.stem(x)))
        x = self.residual1(self.separable1(x))
        x = self.residual2(self.separable2(F.max_pool2d(x, 2)))
        x = self.separable3(F.max_pool2d(x, 2))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: Tensor = self.linear(x)
        return logits


def digits_network() -> DigitsNet:
    """Return the shipped network in eval mode.

    Raises:
        FileFormatError: the shipped weights are missing or damaged.
    """
    model = DigitsNet()
    try:
        model.load_state_dict(read_tensors(WEIGHTS))
    except RuntimeError as error:
        raise FileFormatError(f"{WEIGHTS} does not fit DigitsNet: {error}; reinstall fxquant") from error
    return model.eval()
