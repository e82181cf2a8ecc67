"""Networks whose forward pass or class is unusual: control flow on values, free arguments, a trainer, a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch.nn.functional as F
from torch import Tensor, nn


class ValueDependentNet(nn.Module):
    """Control flow that hangs on a value, which no export can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            answer: Tensor = self.fc(x)
            return answer
        return x


class VariadicNet(nn.Module):
    """Any number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        answer: Tensor = self.fc(sum(others, first))
        return answer


@dataclass
class Classified:
    """What a homemade model returns."""

    features: Tensor
    logits: Tensor
    loss: Tensor | None = None


class Classifier(nn.Module):
    """Looks like a Lightning module: a trainer that is not there, a training step that asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.head = nn.Linear(4, 2)

    @property
    def trainer(self) -> NoReturn:
        raise RuntimeError(f"{type(self).__name__} is not attached to a `Trainer`.")

    def log(self, name: str, value: Tensor) -> None:
        self.trainer.record(name, value)

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        del number
        loss = F.cross_entropy(self(batch[0]).logits, batch[1])
        self.log("loss", loss)
        return loss

    def forward(self, x: Tensor) -> Classified:
        features = self.net(x).mean(dim=(2, 3))
        return Classified(features, self.head(features))
