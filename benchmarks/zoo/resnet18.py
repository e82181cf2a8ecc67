"""ResNet-18 in its ImageNet shape with seeded random weights, for timing and memory, never for accuracy.

Layout: He et al. 2015, table 1; keys are torchvision's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SEED = 0


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and an identity or projected shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        projected = stride != 1 or channels != width
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))
            if projected
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet18(nn.Module):
    """Eight basic blocks, `(N, 3, 224, 224)` to logits `(N, 1000)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def resnet18() -> ResNet18:
    """Return the network with weights drawn from a fixed seed, leaving the caller's generator untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = ResNet18()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Fresh statistics (mean 0, variance 1) would make BatchNorm folding trivially exact.
                module.running_mean = torch.empty(module.num_features).uniform_(-0.2, 0.2)
                module.running_var = torch.empty(module.num_features).uniform_(0.5, 1.5)
    return model.eval()
