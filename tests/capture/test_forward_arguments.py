"""Models whose forward does not take tensors by position: what to do is said, before the work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.capture import capture, input_names
from fxquant.core.errors import CaptureError, InputError

IMAGES = torch.randn(4, 3, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)


class OfDictionary(Net):
    def forward(self, batch: Any) -> Any:
        return self.conv(batch["image"])


class OfList(Net):
    def forward(self, images: Any) -> Any:
        return self.conv(torch.stack(images))


class OfKeyword(Net):
    def forward(self, image: Tensor, *, mask: Tensor, scale: float = 1.0) -> Any:
        return self.conv(image * mask * scale)


class OfKeywords(Net):
    def forward(self, **inputs: Tensor) -> Any:
        return self.conv(inputs["image"])


@pytest.mark.parametrize(
    ("kind", "calibration"),
    [
        (OfDictionary, IMAGES),
        (OfDictionary, [{"image": IMAGES}]),
        (OfDictionary, [{"batch": {"image": IMAGES}}]),
        (OfList, IMAGES),
        (OfKeyword, [{"image": IMAGES, "mask": IMAGES}]),
        (OfKeywords, [{"image": IMAGES}]),
    ],
)
def test_how_to_wrap_is_said(kind: Callable[..., nn.Module], calibration: object) -> None:
    with pytest.raises(InputError, match=r"by position.*module with `def forward\(self, "):
        fxquant.capture(kind(), calibration)


def test_the_wrapper_names_every_input() -> None:
    wrapper = r"takes mask by keyword .*\(self, image, mask\): return self.model\(image, mask=mask\)"
    with pytest.raises(CaptureError, match=wrapper):
        input_names(OfKeyword())


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_norms_of_weights_by_hooks_are_named(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), getattr(nn.utils, name)(nn.Conv2d(4, 4, 3)))
    model(IMAGES)
    with pytest.raises(CaptureError, match=rf"1 has the old .*{name}.*remove_{name}.*parametrizations\.{name}"):
        capture(model, (IMAGES,))


def test_failed_exports_leave_stderr_alone(capfd: pytest.CaptureFixture[str]) -> None:
    class Sliced(Net):
        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            return y[:, : int(y.abs().sum().clamp(1, 2))]

    with pytest.raises(CaptureError, match=r"GuardOnDataDependent.*fxquant\.part\("):
        capture(Sliced(), (IMAGES,))
    with pytest.raises(CaptureError, match="does not run on inputs"):
        capture(nn.Conv2d(4, 4, 3), (IMAGES,))
    assert capfd.readouterr().err == ""
    assert logging.root.manager.disable == 0
