from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxquant.capture import capture
from fxquant.core.errors import CalibrationError
from fxquant.core.run import images_for


def test_any_number_of_images_of_the_traced_sizes() -> None:
    module = capture(nn.Conv2d(3, 2, 1), (torch.zeros(2, 3, 8, 6),)).module
    assert len(images_for(module, [torch.zeros(5, 3, 8, 6), torch.zeros(1, 3, 8, 6)])) == 6
    assert len(images_for(module, torch.zeros(5, 3, 8, 6), 2)) == 2
    free = capture(nn.Conv2d(3, 2, 1), (torch.zeros(2, 3, 8, 6),), dynamic_image=True).module
    assert len(images_for(free, torch.zeros(1, 3, 40, 33))) == 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(4, 3, 9, 6), r"'input' takes float32 of \(images, 3, 8, 6\), .* float32 of \(images, 3, 9, 6\)"),
        (torch.zeros(4, 1, 8, 6), r"are float32 of \(images, 1, 8, 6\); give images of the size and type"),
        (torch.zeros(4, 3, 8), r"are float32 of \(images, 3, 8\)"),
        (torch.zeros(4, 3, 8, 6).double(), "are float64 of"),
        (torch.zeros(4, 3, 8, 6).to(torch.uint8), "are uint8 of"),
    ],
)
def test_other_images(images: Tensor, message: str) -> None:
    module = capture(nn.Conv2d(3, 2, 1), (torch.zeros(2, 3, 8, 6),)).module
    with pytest.raises(CalibrationError, match=message):
        images_for(module, images)
