"""Constants that multiply or shift a layer's output become part of the layer."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.backends.onnx import kernel_report, open_session, session_options
from fxquant.core.facts import NormStatistics
from fxquant.core.ir import Program, clip_bounds, show
from fxquant.passes import Canonicalize, FoldAffine, FoldBatchnorm, FoldConstants
from tests.programs import check_pass

Made = Callable[[nn.Module, Tensor], Tensor]


class Net(nn.Module):
    """A convolution, what a test makes of its output, and a second convolution."""

    def __init__(self, made: Made, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1, bias=bias), nn.Conv2d(4, 4, 3, padding=1)
        self.scale, self.shift = nn.Parameter(torch.tensor([1.7])), nn.Parameter(torch.tensor([-0.3]))
        self.gamma = nn.Parameter(torch.tensor([0.5, 2.0, 1.5, 3.0]).reshape(4, 1, 1))
        self.norm, self.made = nn.BatchNorm2d(4), made

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.made(self, self.a(x)))
        return y


class Tokens(nn.Module):
    """LayerScale behind a linear layer over tokens, as CaiT and DINOv2 have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.gamma = nn.Linear(6, 6), nn.Parameter(torch.linspace(0.1, 0.6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.gamma * self.fc(x)
        return y


def _images(count: int = 16) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.3


def _folded(model: nn.Module, images: Tensor) -> tuple[Program, Program]:
    before = Canonicalize()(fxquant.capture(model.eval(), images))
    for step in (FoldConstants(), FoldBatchnorm()):
        before = step(before)
    return before, check_pass(FoldAffine(), before)


def _ops(program: Program) -> list[str]:
    lines = [line.partition(" = ")[2] for line in show(program.module).splitlines()]
    return [line.split("(")[0].removesuffix(".default") for line in lines if "(" in line and line != "x()"]


def _same(before: Program, after: Program, images: Tensor) -> None:
    torch.testing.assert_close(after.module(images), before.module(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("made", "left", "bounds"),
    [
        (lambda m, y: m.scale * y, [], []),
        (lambda m, y: y / 5 + m.shift, [], []),
        (lambda m, y: torch.sub(y, m.shift, alpha=2), [], []),
        (lambda m, y: m.gamma * y - m.gamma, [], []),
        (lambda _, y: F.relu(y) * 0.2, ["relu"], []),
        (lambda m, y: m.scale * F.relu(y) + m.shift, ["clamp"], [(-0.3, inf)]),
        (lambda _, y: F.relu(y) * -2, ["clamp"], [(-inf, 0.0)]),
        (lambda _, y: F.relu6(y) * -2 + 1, ["clamp"], [(-11.0, 1.0)]),
        (lambda _, y: F.hardtanh(y) * 3 + 3, ["clamp"], [(0.0, 6.0)]),
        (lambda m, y: m.gamma * F.relu(y), ["relu"], []),
        (lambda m, y: m.norm(y) * 0.1, [], []),
        (lambda m, y: torch.add(m.shift, y, alpha=2), [], []),
        (lambda m, y: torch.add(m.gamma, y, alpha=-2), [], []),
        (lambda m, y: torch.sub(m.gamma, y, alpha=3), [], []),
        (lambda _, y: 2 - y, [], []),
        (lambda _, y: 1 - F.relu(y), ["clamp"], [(-inf, 1.0)]),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_what_folds(made: Made, left: list[str], bounds: list[tuple[float, float]], bias: bool) -> None:
    before, after = _folded(Net(made, bias), _images())
    assert _ops(after) == ["conv2d", *left, "conv2d"]
    clips = [clip_bounds(node) for node in after.module.graph.nodes if node.target is torch.ops.aten.clamp.default]
    assert clips == [pytest.approx(each) for each in bounds]
    _same(before, after, _images())
    assert FoldAffine()(after).log[-1].rewrites == 0


@pytest.mark.parametrize(
    "made",
    [
        lambda _, y: y * 0.0,
        lambda _, y: y / 0,
        lambda m, y: y / (m.gamma * 0),
        lambda _, y: y * 1e41,
        lambda _, y: y / 1e60,
        lambda _, y: y.clamp(0.5, 0.1) * 2,
        lambda _, y: y * y.mean(),
        lambda _, y: y + y * 2,
        lambda _, y: torch.sigmoid(y) * 2,
        lambda m, y: m.gamma * F.relu6(y),
        lambda m, y: -m.gamma * F.relu(y),
        lambda m, y: F.relu(y) + m.gamma,
        lambda _, y: y * torch.linspace(1, 2, 8),
        lambda m, y: m.a(F.pad(y[:, :3], (0, 0))) * 2,
    ],
    ids=[
        "zero",
        "by zero",
        "by zeros",
        "too much",
        "too little",
        "crossed bounds",
        "computed",
        "read twice",
        "sigmoid",
        "relu6 by channel",
        "negative by channel",
        "shift by channel",
        "along another axis",
        "shared",
    ],
)
def test_what_does_not(made: Made) -> None:
    before, after = _folded(Net(made), _images())
    assert show(after.module) == show(before.module)


class Moved(nn.Module):
    """LayerScale behind a transpose, as ConvNeXt has it, queries that are scaled as heads, and what stays."""

    def __init__(self, made: Made) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.gamma, self.made = nn.Linear(6, 6), nn.Parameter(torch.linspace(0.1, 0.6, 6)), made

    def forward(self, x: Tensor) -> Tensor:
        return self.made(self, self.fc(x))


def test_layer_scale_is_part_of_the_layer_over_tokens() -> None:
    tokens = torch.rand(4, 5, 6)
    before, after = _folded(Tokens(), tokens)
    assert _ops(after) == ["linear", "add.Tensor"]
    _same(before, after, tokens)


@pytest.mark.parametrize(
    ("made", "left"),
    [
        (lambda m, y: y.permute(2, 0, 1) * m.gamma.reshape(6, 1, 1), ["permute"]),
        (
            lambda m, y: y.transpose(0, 2).transpose(1, -1) * m.gamma.reshape(6, 1, 1),
            ["transpose.int", "transpose.int"],
        ),
        (lambda m, y: F.relu(y.permute(0, 2, 1)) * m.gamma[:, None], ["permute", "relu"]),
        (lambda m, y: F.relu(y).permute(0, 2, 1) * m.gamma[:, None], ["relu", "permute"]),
        (lambda _, y: y.reshape(len(y), 5, 2, 3).transpose(1, 2) * 3**-0.5, ["reshape", "transpose.int"]),
        (lambda _, y: F.relu(y.permute(0, 2, 1)[:, :4]) / 7 - 0.1, ["permute", "slice.Tensor", "clamp"]),
    ],
)
def test_what_folds_behind_views(made: Made, left: list[str]) -> None:
    tokens = torch.rand(4, 5, 6)
    before, after = _folded(Moved(made), tokens)
    assert [op for op in _ops(after) if not op.startswith("sym_size")] == ["linear", *left]
    _same(before, after, tokens)


@pytest.mark.parametrize(
    "made",
    [
        lambda m, y: y.reshape(-1, 5, 2, 3) * m.gamma.reshape(2, 3),
        lambda m, y: y.permute(0, 2, 1)[:, 1:] * m.gamma[1:, None],
        lambda _, y: F.relu(F.relu6(y) - 1) * 2,
        lambda _, y: y.permute(0, 2, 1) * torch.ones(5),
        lambda _, y: torch.cat([y.transpose(1, 2), y.transpose(1, 2) * 2], 1),
    ],
    ids=["apart", "some of the channels", "two clips", "along tokens", "read twice"],
)
def test_what_stays_behind_views(made: Made) -> None:
    tokens = torch.rand(4, 5, 6)
    before, after = _folded(Moved(made), tokens)
    assert len(_ops(after)) >= len(_ops(before)) - 1
    assert any(op.startswith("mul") for op in _ops(after))
    _same(before, after, tokens)


def _normed(model: nn.Module, y: Tensor) -> Tensor:
    assert isinstance(model, Net)
    normed: Tensor = model.norm(y)
    return normed * 0.1


def test_what_a_norm_knew_of_its_input_holds_no_more() -> None:
    before, after = _folded(Net(_normed), _images())
    assert len(before[NormStatistics].folded) == 1
    assert not after[NormStatistics].folded


WAYS: dict[str, Callable[[Tensor, Tensor | float, float], Tensor]] = {
    "y c": lambda y, c, _: y * c,
    "c y": lambda y, c, _: c * y,
    "y / c": lambda y, c, _: y / c,
    "y + a c": lambda y, c, a: torch.add(y, c, alpha=a),
    "c + a y": lambda y, c, a: torch.add(torch.as_tensor(c), y, alpha=a),
    "y - a c": lambda y, c, a: torch.sub(y, c, alpha=a),
    "c - a y": lambda y, c, a: torch.sub(torch.as_tensor(c), y, alpha=a),
}
"""Every order of value, constant c and alpha a."""


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_ways_one_behind_the_other(data: st.DataObject) -> None:
    number = st.floats(-3, 3).filter(lambda a: abs(a) > 0.1)
    chosen = data.draw(st.lists(st.tuples(st.sampled_from([*WAYS]), number, number, st.booleans()), max_size=3))
    clips: list[Callable[[Tensor], Tensor]] = [F.relu, F.relu6, F.hardtanh, torch.clone]
    clip = data.draw(st.sampled_from(clips))

    def made(model: nn.Module, y: Tensor) -> Tensor:
        assert isinstance(model, Net)
        y = clip(y)
        for way, constant, alpha, by_channel in chosen:
            y = WAYS[way](y, constant * model.gamma if by_channel else constant, alpha)
        return y

    before, after = _folded(Net(made), _images(4))
    _same(before, after, _images(4))
    if not any(by_channel for *_, by_channel in chosen):
        assert set(_ops(after)) <= {"conv2d", "relu", "clamp", "relu6", "hardtanh"}


@pytest.mark.parametrize("target", ["onnxruntime", "fx_int8"])
@pytest.mark.parametrize(
    "made",
    [
        lambda m, y: m.scale * F.relu(y) + 0.4,
        lambda m, y: m.scale * F.relu(y) - 0.4,
        lambda _, y: F.relu6(y) * -2 + 1,
        lambda _, y: F.hardtanh(y),
        lambda _, y: y.clamp(max=0.5),
        lambda _, y: y.clamp(0.1, 0.5),
    ],
    ids=["raised", "lowered", "turned", "hardtanh", "open below", "above zero"],
)
def test_any_clip_is_part_of_the_kernel(made: Made, target: str, tmp_path: Path) -> None:
    model = Net(made).eval()
    result = fxquant.quantize(
        model, _images(), {"average_bits": 8}, bits=(8,), target=target, effort="fast", progress=False
    )
    unseen = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 1.5 - 0.5
    with torch.inference_mode():
        simulated = result.simulated(unseen)
        if target == "fx_int8":
            found = result.lowered(unseen)
        else:
            path = result.to_onnx(tmp_path / "net.onnx").path
            if target == "onnxruntime":
                assert kernel_report(path).float_layers == ()
            session = open_session(path, session_options())
            found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: unseen.numpy()})[0])
    # Both layers round where the simulation does: a step of the hidden grid in few places at most.
    wrong = (found - simulated).abs() > 1e-3 * simulated.abs().max()
    assert float(wrong.float().mean()) < 0.02
