"""Tiny networks, each named for the difficulty it holds; `MODELS` gives every one with example inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualNet(nn.Module):
    """A residual add of two quantized values, its sum read by both an integer and a float consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        x = F.silu(x) + self.conv3(x)
        answer: Tensor = self.fc(x.mean(dim=(2, 3)))
        return answer


class SeparableNet(nn.Module):
    """Depthwise convolutions, ReLU6, hard-swish, global adaptive pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        x = F.relu6(self.norm(self.depthwise(x)))
        x = F.adaptive_avg_pool2d(self.pointwise(x), 1)
        answer: Tensor = self.head(torch.flatten(F.dropout(x, training=self.training), 1))
        return answer


class SharedNet(nn.Module):
    """One convolution used twice, each use with its own batch norm; two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn_a = nn.BatchNorm2d(4)
        self.bn_b = nn.BatchNorm2d(4)
        self.fc_a = nn.Linear(4, 4)
        self.fc_b = nn.Linear(4, 4)
        self.fc_b.weight = self.fc_a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn_a(self.conv(x)))
        x = torch.relu(self.bn_b(self.conv(x)))
        answer: Tensor = self.fc_b(torch.sigmoid(self.fc_a(x.amax(dim=(2, 3)))))
        return answer


class PaddedNet(nn.Module):
    """Grouped convolution, asymmetric zero padding, padding with ones, "same" padding of odd and even kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.same = nn.Conv2d(8, 4, 3, padding="same", dilation=2)
        self.even = nn.Conv2d(4, 4, 2, padding="same")
        self.last = nn.Conv2d(4, 2, 1, padding="valid")

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(F.pad(x, (0, 1, 0, 1)))
        x = self.even(F.max_pool2d(torch.relu(self.same(x)), 2))
        answer: Tensor = self.last(F.pad(x, (1, 1, 1, 1), value=1.0)).flatten(1)
        return answer


class ConcatNet(nn.Module):
    """A concatenation of unlike branches, then a batch norm no convolution can take."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 4, 1)
        self.pooled = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([torch.relu(self.left(x)), self.right(x)], dim=1)
        return self.mix(self.norm(x)).mean(dim=(2, 3)), self.pooled(F.max_pool2d(x, 2))


class TwoInputNet(nn.Module):
    """Two inputs, a dictionary as answer, one value in both slots of an add."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 4, 1)
        self.mask = nn.Conv2d(1, 4, 1, bias=False)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        features = self.image(image)
        doubled = torch.add(features, features)
        return {"logits": self.out(doubled + self.mask(mask)).mean(dim=(2, 3)), "features": features}


class SequenceNet(nn.Module):
    """Convolution in one dimension, max pool, GELU, a slice of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 6, 5, padding="same")
        self.norm = nn.BatchNorm1d(6)
        self.conv2 = nn.Conv1d(6, 4, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(torch.relu(self.norm(self.conv1(x))), 2)
        return F.gelu(self.conv2(x[:, :, 1:])).mean(dim=2)


class AttentionNet(nn.Module):
    """A transformer block: patches, class token, position table, attention, layer norm, MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16))
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.wide = nn.Linear(16, 32)
        self.narrow = nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.narrow(F.gelu(self.wide(x)))
        answer: Tensor = self.head(x[:, 0])
        return answer


class InvertedNet(nn.Module):
    """Inverted residuals: products over single pixels and depthwise filters, sums behind both kinds of filter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(8, 16, 1)
        self.depth = nn.Conv2d(16, 16, 3, groups=16)
        self.narrow = nn.Conv2d(16, 8, 1)
        self.same = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = x + self.narrow(F.relu6(self.depth(F.pad(F.relu6(self.wide(x)), (1, 1, 1, 1)))))
        x = torch.relu(x + self.same(x))
        answer: Tensor = self.fc(x.mean(dim=(2, 3)))
        return answer


class TokenNet(nn.Module):
    """Integer inputs, an embedding whose table is also the classifier's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        answer: Tensor = self.out(torch.relu(self.fc(self.table(ids).mean(dim=1))))
        return answer


class FunctionalNet(nn.Module):
    """Weights outside modules, a bias the graph computes, scaled adds, clamps, a product with a scalar tensor."""

    projection: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3) * 0.2)
        self.bias = nn.Parameter(torch.randn(4))
        self.register_buffer("projection", torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias * 2.0, padding=1).clamp(min=0.0, max=4.0)
        x = torch.add(x, F.conv2d(x, self.weight.sum(dim=1, keepdim=True), groups=4, padding=1), alpha=3)
        x = x * x.mean()
        x = F.linear(x.mean(dim=(2, 3)), self.projection, self.bias)
        return torch.matmul(x.unsqueeze(1), x.unsqueeze(2)).flatten(1)


class AddOfFloatsNet(nn.Module):
    """A sum of two values that no integer op makes, in front of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(torch.sigmoid(x) + F.gelu(x))
        answer: Tensor = self.linear(x.mean(dim=(2, 3)))
        return answer


class TokenNormNet(nn.Module):
    """Batch norm over the tokens behind a linear layer whose width equals their number: folding would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.norm(self.linear(x))
        return answer


class BiasElsewhereNet(nn.Module):
    """A convolution without bias in front of a batch norm, in a module whose `bias` serves another op."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))
        self.bias = nn.Parameter(torch.full((4,), 7.0))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.norm(F.conv2d(x, self.weight)).mean(dim=(2, 3)) * self.bias
        return answer


class NameClashNet(nn.Module):
    """Two weights whose paths differ by a dot and an underscore only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1))
        self.conv_1 = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.conv_1(self.conv(x)).mean(dim=(2, 3))
        return answer


class UpsamplingNet(nn.Module):
    """Transposed convolutions of several forms, one of them twice; pixel shuffles, nearest interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(12, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 4, 2, 1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.same = nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.uneven = nn.ConvTranspose2d(4, 3, (3, 2), (2, 1), (1, 0), output_padding=(1, 0))
        self.dilated = nn.ConvTranspose2d(3, 2, 2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.up(torch.relu(self.down(F.pixel_unshuffle(x, 2))))))
        x = self.uneven(torch.relu(F.interpolate(self.same(self.same(x)), scale_factor=1.5, mode="nearest")))
        answer: Tensor = self.dilated(x).mean(dim=(2, 3))
        return answer


class WeightlessNet(nn.Module):
    """Nothing to quantize."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x.mean(dim=(2, 3)), dim=1)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    """Number of images -> inputs."""


def _images(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda count: (torch.randn(count, *shape, generator=torch.Generator().manual_seed(count)),)


def _pair(count: int) -> tuple[Tensor, ...]:
    return (*_images(3, 6, 6)(count), *_images(1, 6, 6)(count))


MODELS: dict[str, Case] = {
    "residual": Case(ResidualNet, _images(3, 8, 8)),
    "separable": Case(SeparableNet, _images(3, 10, 10)),
    "shared": Case(SharedNet, _images(4, 6, 6)),
    "padded": Case(PaddedNet, _images(4, 9, 9)),
    "concat": Case(ConcatNet, _images(3, 6, 6)),
    "two_inputs": Case(TwoInputNet, _pair),
    "sequence": Case(SequenceNet, _images(2, 14)),
    "attention": Case(AttentionNet, _images(3, 8, 8)),
    "inverted": Case(InvertedNet, _images(3, 12, 12)),
    "tokens": Case(TokenNet, lambda count: (torch.arange(count * 4).reshape(count, 4) % 11,)),
    "functional": Case(FunctionalNet, _images(3, 6, 6)),
    "add_of_floats": Case(AddOfFloatsNet, _images(3, 6, 6)),
    "token_norm": Case(TokenNormNet, _images(6, 6)),
    "bias_elsewhere": Case(BiasElsewhereNet, _images(3, 5, 5)),
    "name_clash": Case(NameClashNet, _images(3, 4, 4)),
    "upsampling": Case(UpsamplingNet, _images(3, 8, 8)),
    "weightless": Case(WeightlessNet, _images(3, 4, 4)),
}
"""Name -> a network that exports."""


class Composed(nn.Module):
    """A network of named layers and parameters, with a function of itself and its inputs as forward pass."""

    def __init__(self, answer: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.answer = answer

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        return self.answer(self, x, *more)


def built(name: str) -> nn.Module:
    """Return the network of this name with seeded weights and batch-norm statistics that are not 0 and 1."""
    torch.manual_seed(sum(map(ord, name)))
    model = MODELS[name].make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()
