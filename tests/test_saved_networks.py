"""A result that is saved, before or after any use of it, is loaded as it was: networks whose graph a file changes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxquant
from fxquant import Budget, Result
from fxquant.backends.onnx import OnnxOptions
from fxquant.core.storage import StoredProgram

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class TwoInputs(nn.Module):
    """Reads the batch of its inputs; which of them a graph takes it from depends on their names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(16, 4)

    def answer(self, one: Tensor, other: Tensor) -> Tensor:
        found: Tensor = self.head(torch.cat([self.body(one), self.body(other)], 1))
        return found


def two_inputs(one: str, other: str) -> nn.Module:
    space: dict[str, Callable[..., Tensor]] = {}
    exec(f"def forward(self, {one}, {other}): return self.answer({one}, {other})", space)
    made: nn.Module = type("Named", (TwoInputs,), space)()
    return made


class Strides(nn.Module):
    """A detector's decoding: offsets and strides of every pixel, the strides read from a tensor as numbers."""

    strides: Tensor

    def __init__(self, hold: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        hold(self, torch.tensor([2.0, 4.0]))

    def forward(self, image: Tensor) -> Tensor:
        maps = [self.one(image)]
        maps.append(self.other(maps[0]))
        points, strides = [], []
        for known, stride in zip(maps, self.strides, strict=True):
            h, w = known.shape[-2:]
            rows, columns = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
            points.append(torch.stack((columns, rows), -1).view(-1, 2))
            strides.append(torch.full((h * w, 1), stride, dtype=known.dtype))
        found = torch.cat([known.flatten(2) for known in maps], 2)
        boxes = (found[:, :2] + torch.cat(points).t()) * torch.cat(strides).t()
        return torch.cat([boxes, found[:, 2:].sigmoid()], 1)


class Inplace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 4)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = functional.relu_(self.conv(image))
        x[:, :2] += 1
        return {"scores": self.head(x.mul_(2.0).mean((2, 3))), "map": x}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.read(tokens).view(tokens.shape[0], -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None] > 0.5)
        found: Tensor = self.write(x.transpose(1, 2).reshape(mask.shape[0], -1, 16))
        return found


STEM = partial(
    lambda: nn.Sequential(nn.Conv2d(3, 8, 7, 2), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
)
ATTRIBUTE, BUFFER, TEMPORARY = (
    lambda module, value: setattr(module, "strides", value),
    lambda module, value: module.register_buffer("strides", value),
    lambda module, value: module.register_buffer("strides", value, persistent=False),
)
PAIR = (IMAGES, IMAGES.flip(0))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "rgb, depth": (partial(two_inputs, "rgb", "depth"), PAIR),
    "image, mask": (partial(two_inputs, "image", "mask"), PAIR),
    "left, right": (partial(two_inputs, "left", "right"), PAIR),
    "attribute": (partial(Strides, ATTRIBUTE), (IMAGES,)),
    "buffer": (partial(Strides, BUFFER), (IMAGES,)),
    "temporary buffer": (partial(Strides, TEMPORARY), (IMAGES,)),
    "in place": (Inplace, (IMAGES,)),
    "attention": (Attention, (torch.ones(6, 5, 16).cumsum(1).cos(), torch.ones(6, 5))),
    # Its export pads the image by a pixel, which once fixed the batch of everything made of the graph.
    "stem": (STEM, (torch.rand(6, 3, 35, 35, generator=torch.Generator().manual_seed(1)),)),
}


def quantized(name: str) -> tuple[Result, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    factory, inputs = NETWORKS[name]
    model = factory().eval()
    return fxquant.quantize(model, [inputs], None, bits=(8,), effort="fast", progress=False), inputs


def answers(result: Result, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    found: list[Tensor] = torch.utils._pytree.tree_leaves(result.simulated(*inputs))
    return found


def described(result: Result) -> str:
    """Return all that a graph and what it was made from say, sizes included."""
    exported = result.program[StoredProgram].exported
    return f"{exported}{[node.meta.get('val') for node in result.program.module.graph.nodes]}"


@pytest.mark.parametrize("name", NETWORKS)
def test_a_result_is_loaded_as_it_was_before_and_after_every_use(name: str, tmp_path: Path) -> None:
    result, inputs = quantized(name)
    fresh, known, before = result.save(tmp_path / "fresh"), answers(result, inputs), described(result)
    file = tmp_path / "model.onnx"
    result.to_onnx(file)
    first = file.read_bytes()
    result.to_onnx(file, OnnxOptions(runtime="openvino"))
    fxquant.lower(result, "fx_int8")
    assert described(result) == before
    used = fxquant.load(result.save(tmp_path / "used"))
    for found in (fxquant.load(fresh), used, fxquant.load(used.save(tmp_path / "again"))):
        assert all(torch.equal(one, other) for one, other in zip(answers(found, inputs), known, strict=True))
        assert found.allocation.to_json() == result.allocation.to_json()
    used.to_onnx(file)
    assert file.read_bytes() == first


def test_a_folder_serves_every_later_step(tmp_path: Path) -> None:
    result, inputs = quantized("rgb, depth")
    result.to_onnx(tmp_path / "model.onnx")
    folder = result.save(tmp_path / "result")
    found = fxquant.load(folder)
    found.report(tmp_path / "report.html")
    assert (
        fxquant.resolve(folder, Budget(average_bits=8), progress=False).allocation.choices == found.allocation.choices
    )
    rounded = fxquant.reconstruct(folder, [inputs], "gptq", progress=False)
    assert rounded.allocation.choices == found.allocation.choices
    model = NETWORKS["rgb, depth"][0]()
    model.load_state_dict(found.program[StoredProgram].exported.state_dict)
    options: dict[str, Any] = {"result": folder, "inductor": False}
    compiled = torch.compile(model.eval(), backend="fxquant", options=options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), fxquant.lower(found, "fx_int8")(*inputs))


READ = """
import sys, torch, fxquant
found = fxquant.load(sys.argv[1])
torch.save(found.simulated(*found.held_out.inputs), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image, mask", "attribute"])
def test_another_process_reads_it(name: str, tmp_path: Path) -> None:
    result, _ = quantized(name)
    folder = result.save(tmp_path / "result")
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", READ, str(folder), str(tmp_path / "found.pt")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
        assert result.held_out is not None
        assert torch.equal(torch.load(tmp_path / "found.pt"), result.simulated(*result.held_out.inputs))
