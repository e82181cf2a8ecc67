"""Files with free height and width answer as PyTorch does at every size, or are not written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import fxquant
from fxquant import flow
from fxquant.backends import lower
from fxquant.backends.onnx import EMITTERS, export_onnx, open_session, session_options
from fxquant.core.errors import LoweringError
from fxquant.core.facts import Settings
from fxquant.core.run import CalibrationSet, first_tensor
from fxquant.passes import simulate, widest_plan

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SIZES = ((3, 33, 33), (1, 64, 48), (2, 39, 34))
Head = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """Two convolutions and what `head` makes of them."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = head

    def forward(self, x: Tensor) -> Any:
        return self.head(self, x)


def padded_and_cut(n: Net, x: Tensor) -> Any:
    h, w = x.shape[-2:]
    return n.one(F.pad(x, (0, -w % 16, 0, -h % 16)))[:, :, :h, :w]


def pyramid(n: Net, x: Tensor) -> Any:
    y = n.one(x)
    pooled = [F.adaptive_avg_pool2d(y, k) for k in (1, 2, 3, 6)]
    return torch.cat([y, *(F.interpolate(p, size=y.shape[2:], mode="bilinear") for p in pooled)], 1)


def patches(n: Net, x: Tensor) -> Any:
    y = n.one(x)
    c, h, w = y.shape[1], y.shape[2] // 4, y.shape[3] // 4
    cut = y[:, :, : h * 4, : w * 4].reshape(-1, c, h, 4, w, 4)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, h * w, c * 16)


def middle(n: Net, x: Tensor) -> Any:
    y = n.one(x)
    h, w = y.shape[2:]
    return y[:, :, h // 4 : h - h // 4, 1 : w // 2 + 1]


def halves(n: Net, x: Tensor) -> Any:
    left, right = n.one(x).chunk(2, dim=3)
    return torch.cat([right, left], 3)


def attention(n: Net, x: Tensor) -> Any:
    y = F.avg_pool2d(n.one(x), 4)
    t = y.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(t, t, t).transpose(1, 2).reshape(y.shape)


def padded_to(n: Net, x: Tensor) -> Any:
    y = n.one(x)
    q = F.interpolate(n.two(F.max_pool2d(y, 2)), scale_factor=2.0)
    down, right = y.shape[2] - q.shape[2], y.shape[3] - q.shape[3]
    return y + F.pad(q, (right // 2, right - right // 2, down // 2, down - down // 2))


def pixels(n: Net, x: Tensor) -> Any:
    y = n.one(x)
    return y + torch.arange(y.shape[3]) * 0.01 - y.shape[2] * 0.1


HEADS: dict[str, Head] = {
    "padded to 16 and cut": padded_and_cut,
    "pooled to 4": lambda n, x: F.adaptive_avg_pool2d(n.one(x), 4),
    "pooled to 1 row": lambda n, x: F.adaptive_avg_pool2d(n.one(x), (1, 3)),
    "pooled along one axis": lambda n, x: F.adaptive_avg_pool2d(n.one(x), (None, 1)),
    "most of 3 by 2": lambda n, x: F.adaptive_max_pool2d(n.one(x), (3, 2)),
    "columns pooled to 5": lambda n, x: F.adaptive_avg_pool1d(n.one(x).mean(2), 5),
    "pyramid": pyramid,
    "patches": patches,
    "middle": middle,
    "halves": halves,
    "attention": attention,
    "enlarged to fit": lambda n, x: F.interpolate(n.two(F.max_pool2d(n.one(x), 2)), size=x.shape[2:], mode="bilinear"),
    "padded to fit": padded_to,
    "pixel numbers": pixels,
    "normalised": lambda n, x: F.layer_norm(n.one(x), [4, *x.shape[2:]]),
    "repeated": lambda n, x: n.one(x) * n.two(n.one(x)).mean((2, 3), True).repeat(1, 1, x.shape[2], x.shape[3]),
    "kept pixel": lambda n, x: n.one(x)[:, :, x.shape[2] // 2],
    "class of each pixel": lambda n, x: padded_and_cut(n, x).argmax(1),
}


def simulated(head: Head) -> GraphModule:
    program = flow.prepare(fxquant.capture(Net(head), IMAGES, dynamic_image=True), Settings(bits=(8,)))
    program = flow.calibrate(program, CalibrationSet((IMAGES,)))
    return simulate(program, widest_plan(program)).module


@pytest.mark.parametrize("name", HEADS)
def test_a_file_answers_as_torch_does_at_every_size(name: str, tmp_path: Path) -> None:
    module = simulated(HEADS[name])
    export_onnx(module, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", session_options(1))
    for batch, *size in SIZES:
        x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            model, expected = Net(HEADS[name])(x), first_tensor(module(x))
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        assert found.shape == expected.shape == model.shape
        if found.is_floating_point():
            assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_a_file_that_is_wrong_at_another_size_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As PyTorch's exporter writes it: with the windows of the traced size.
    monkeypatch.delitem(EMITTERS, torch.ops.aten.adaptive_avg_pool2d.default)
    module = simulated(HEADS["pooled to 4"])
    with pytest.raises(LoweringError, match=r"answers otherwise than PyTorch .*dynamic_image=False"):
        export_onnx(module, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shape", "message"), [([2, -1], "answers otherwise than PyTorch for inputs of another"), ([2, 3600], "not run on")]
)
def test_a_free_number_of_images_is_tried_too(
    shape: list[int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = fxquant.capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), IMAGES)
    export_onnx(program.module, tmp_path / "model.onnx")

    def two_images(lowering: Any, node: Any) -> str:
        written: str = lowering.write(node, "Reshape", [lowering.value(node.args[0]), lowering.integers(shape)])
        return written

    (flat,) = program.module.graph.output_node().all_input_nodes
    monkeypatch.setitem(EMITTERS, flat.target, two_images)
    with pytest.raises(LoweringError, match=message):
        export_onnx(program.module, tmp_path / "wrong.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


class OwnFilters(nn.Module):
    """Filters that the network computes of each image: as many groups as images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.filters = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2 * 4 * 9)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        n, c, h, w = y.shape
        k = self.filters(y.mean((2, 3))).view(n * 2, c, 3, 3)
        return F.conv2d(y.reshape(1, n * c, h, w), k, groups=n).reshape(n, 2, h - 2, w - 2)


def test_an_op_without_a_form_is_named_with_its_line_and_runs_in_pytorch(tmp_path: Path) -> None:
    program = flow.prepare(fxquant.capture(OwnFilters(), IMAGES), Settings(bits=(8,)))
    module = simulate(done := flow.calibrate(program, CalibrationSet((IMAGES,))), widest_plan(done)).module
    with pytest.raises(
        LoweringError, match=r"conv2d.* depends on the size .*test_free_sizes\.py:\d+: .*PyTorch runs it"
    ):
        export_onnx(module, tmp_path / "model.onnx")
    found = lower("fx_int8", module)(IMAGES[:3])
    assert torch.allclose(found, module(IMAGES[:3]), atol=0.1)


def test_complex_answers_are_refused_with_the_way_out(tmp_path: Path) -> None:
    program = fxquant.capture(Net(lambda n, x: torch.fft.rfft(n.one(x))), IMAGES)
    with pytest.raises(LoweringError, match=r"is complex64, which .*view_as_real"):
        export_onnx(program.module, tmp_path / "model.onnx")
