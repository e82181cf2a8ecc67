"""Programs ready to be scored, and the plain full-forward oracle that the scorer is compared with."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant import flow
from fxquant.capture import capture
from fxquant.core.facts import FakeQuantNodes, Ranges, Settings, WeightGrids
from fxquant.core.ir import Candidate, EdgeGroups, FakeQuantize, Program, finish, fork, resolve, set_module
from fxquant.core.run import LOSSES, CalibrationSet, Loss, model_outputs
from fxquant.core.storage import ScoreStore
from fxquant.passes import simulate, widest_plan
from fxquant.passes.sensitivity import Scorer
from tests.models import MODELS
from tests.programs import captured


class PlainNet(nn.Module):
    """Two convolutions that read one value, an add, a classifier; no batch norm: weights are the graph's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 5, 3)
        self.conv3 = nn.Conv2d(6, 5, 3, bias=False)
        self.fc = nn.Linear(5, 4)
        with torch.no_grad():
            # Answers that differ from image to image.
            for parameter in self.fc.parameters():
                parameter.mul_(6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv1(x))
        h = self.conv2(h) + self.conv3(h).sigmoid()
        y: Tensor = self.fc(h.mean(dim=(2, 3)))
        return y


class SplitNet(nn.Module):
    """Softmax over a sum of two linear layers of unlike inputs: shifts of the output add up exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 5)
        self.b = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x[:, :8]) + self.b(x[:, 8:])
        return y


class WovenNet(nn.Module):
    """One layer used before and after another: its second use lies downstream of both."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(6, 6)
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(torch.relu(self.outer(x)))
        y: Tensor = 3 * self.outer(torch.relu(x))
        return y


def plain_net() -> PlainNet:
    torch.manual_seed(3)
    return PlainNet().eval()


def inputs(name: str, count: int) -> tuple[Tensor, ...]:
    """Return seeded inputs of a network of this file or of `tests.models`."""
    shapes = {"plain": (3, 6, 6), "split": (16,), "woven": (6,)}
    if name in shapes:
        return (torch.randn(count, *shapes[name], generator=torch.Generator().manual_seed(count)),)
    return MODELS[name].inputs(count)


@cache
def traced(name: str) -> Program:
    """Return the captured program of a network of this file or of `tests.models`."""
    if name == "plain":
        return capture(plain_net(), inputs(name, 2))
    if name in ("split", "woven"):
        torch.manual_seed(5)
        return capture((SplitNet() if name == "split" else WovenNet()).eval(), inputs(name, 2))
    return captured(name)


@cache
def calibrated(name: str, bits: tuple[int | str, ...] = (2, 4, 8), activation_bits: tuple[int, ...] = (8,)) -> Program:
    """Return it prepared for the reference target and calibrated on 8 images."""
    # Rounded to nearest, as the oracles here are.
    settings = Settings(
        bits=bits,
        activation_bits=activation_bits,
        target="reference",
        estimators=("gram", "diagonal"),
        scoring_rounding="nearest",
    )
    program = flow.prepare(traced(name), settings)
    # Shown to the observers by hand, so that the weights stay those of the model, as the oracles have them.
    with torch.no_grad():
        program.module(*inputs(name, 8))
    return flow.calibrate(program, None)


@cache
def simulated(name: str, bits: tuple[int, ...] = (2, 4, 8), activation_bits: tuple[int, ...] = (8,)) -> Program:
    """Return the simulated graph with every site at its widest precision: what is scored."""
    program = calibrated(name, bits, activation_bits)
    return simulate(program, widest_plan(program), round_biases=False)


@cache
def scored(name: str, bits: tuple[int, ...] = (2, 4, 8), activation_bits: tuple[int, ...] = (8,)) -> Program:
    """Return the calibrated program with its sensitivity, measured on 6 images."""
    return flow.measure_sensitivity(calibrated(name, bits, activation_bits), CalibrationSet(inputs(name, 6)))


def scorer(
    program: Program, images: CalibrationSet, loss: str | Loss = "kl", store: ScoreStore | None = None
) -> Scorer:
    """Return a scorer that keeps nothing unless shown to, with two batches where there are enough images."""
    made = Scorer(program, images, loss, store or ScoreStore(None, {}))
    made.batch = min(made.batch, 4)
    return made


def substituted(program: Program, *candidates: Candidate) -> GraphModule:
    """Return the float network with these substitutions, built from modules instead of replayed."""
    module, nodes = fork(program.module), program[FakeQuantNodes]
    for names in (*nodes.weights.values(), *nodes.activations.values()):
        for name in names:
            set_module(module, str(resolve(module.graph, name).target), nn.Identity())
    for candidate in candidates:
        if candidate.choice.is_float:
            continue
        grid = program[WeightGrids].at(candidate.site, candidate.choice.weight)
        for name in nodes.weights[candidate.site]:
            quantizer = FakeQuantize(grid)
            set_module(module, str(resolve(module.graph, name).target), quantizer)
        groups = program[EdgeGroups]
        bits = candidate.choice.activation_bits
        for name in nodes.inputs[candidate.site]:
            node = resolve(module.graph, name)
            group = groups.group_of(node.all_input_nodes[0].name)
            assert group is not None
            quantizer = FakeQuantize(program[Ranges].grid(groups.producers[group], bits))
            set_module(module, str(node.target), quantizer)
    return finish(module)


@cache
def full_forward(name: str, count: int, *candidates: Candidate) -> Tensor:
    """Return the answers of a network with these substitutions on its first images, by whole forward passes."""
    return model_outputs(substituted(simulated(name), *candidates), inputs(name, count))


def full_forward_losses(name: str, images: CalibrationSet, loss: str, *candidates: Candidate) -> Tensor:
    """Return the loss per image of substitutions by whole forward passes."""
    reference, answer = full_forward(name, len(images)), full_forward(name, len(images), *candidates)
    return LOSSES[loss](reference, answer, images.labels)
