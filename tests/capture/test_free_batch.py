"""Exported programs of one batch size, which is what torch.export makes unless it is told otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxquant
from fxquant.capture import capture
from fxquant.core.errors import CaptureError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
    # torch.export says so of every recurrent layer.
    pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning"),
]
IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(512, 4)

    def forward(self, image: Tensor) -> Tensor:
        return torch.as_tensor(self.head(functional.relu_(self.conv(image)).view(image.shape[0], -1)))


class Tokens(nn.Module):
    """A class token for every image, attention, and zeros as a second answer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.read, self.head = nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        n = image.shape[0]
        x = torch.cat([self.token.expand(n, -1, -1), self.patches(image).flatten(2).transpose(1, 2)], 1)
        q, k, v = self.read(x).reshape(n, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, 17, 16)
        return {"scores": self.head(x[:, 0]), "zeros": x.new_zeros(n, 2)}


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.layer = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)

    def forward(self, image: Tensor) -> Tensor:
        n, _, h, w = image.shape
        x = self.conv(image).view(n, 8, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(n * 16, 16, 8)
        x = self.layer(x).view(n, 4, 4, 4, 4, 8).permute(0, 5, 1, 3, 2, 4)
        return torch.reshape(x, (n, 8, h, w))


class Steps(nn.Module):
    """Its states count layers before images, its answer steps before images."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.head = nn.LSTM(48, 8, num_layers=2), nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.steps(image.permute(2, 0, 1, 3).flatten(2))[0]))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, image: Tensor) -> Tensor:
        x: Tensor = self.conv(image)
        return x - x.mean(0, keepdim=True)


class OneByOne(Mixed):
    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([self.conv(each[None]) for each in image])


def program(model: nn.Module, batch: int) -> torch.export.ExportedProgram:
    return torch.export.export(model.eval(), (IMAGES[:batch],))


def leaves(answer: object) -> list[Tensor]:
    found: list[Tensor] = torch.utils._pytree.tree_leaves(answer)
    return found


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("factory", [Flat, Tokens, Windows, Steps])
def test_a_batch_of_one_size_is_freed(factory: type[nn.Module], batch: int) -> None:
    torch.manual_seed(0)
    model = factory().eval()
    for exported in (program(model, batch), *([program(model, batch).run_decompositions()] * (factory is not Steps))):
        before = str(exported)
        captured = capture(exported, (IMAGES[:2],))
        assert str(exported) == before
        for count in (1, 5):
            found, known = captured.module(IMAGES[:count]), model(IMAGES[:count])
            for one, other in zip(leaves(found), leaves(known), strict=True):
                torch.testing.assert_close(one, other)


def test_it_is_quantized_like_its_model() -> None:
    model = Flat().eval()
    results = [
        fxquant.quantize(each, IMAGES, None, bits=(8,), effort="fast", target="fx_int8", progress=False)
        for each in (model, program(model, 1))
    ]
    assert torch.equal(results[0].lowered(IMAGES), results[1].lowered(IMAGES))


@pytest.mark.parametrize("factory", [Mixed, OneByOne])
@pytest.mark.parametrize("batch", [1, 3])
def test_what_needs_its_batch_is_refused_with_how_to_export(factory: type[nn.Module], batch: int) -> None:
    exported = program(factory(), batch)
    for each in (exported, exported.run_decompositions()):
        with pytest.raises(
            CaptureError, match=rf"takes batches of {batch} only .* dynamic_shapes=\(\{{0: torch.export"
        ):
            capture(each, (IMAGES[:2],))


def test_a_recurrent_layer_in_steps_is_never_run_on_states_of_another_batch() -> None:
    with pytest.raises(CaptureError, match="takes batches of 4 only"):
        capture(program(Steps(), 4).run_decompositions(), (IMAGES[:2],))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"takes float32 of \(images, 3, 16, 16\).*\(images, 3, 8, 8\)"):
        capture(program(Flat(), 2), (IMAGES[:2, :, :8, :8],))


@pytest.mark.parametrize("inside", [False, True])
def test_torchscript_is_refused_by_name(inside: bool) -> None:
    scripted: nn.Module = torch.jit.trace(nn.Conv2d(3, 4, 3), IMAGES)  # type: ignore[no-untyped-call]
    model = nn.Sequential(nn.Identity(), scripted) if inside else scripted
    with pytest.raises(CaptureError, match=f"{'1' if inside else 'the model'} is TorchScript.*the Python module"):
        fxquant.quantize(model, IMAGES, None)
