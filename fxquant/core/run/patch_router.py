"""`PatchRouter`: which of two plans a patch gets, by how much its pixels change from one to the next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxquant.core.errors import OptionError


def gradient_magnitude(images: Tensor) -> Tensor:
    """Return how much neighbouring pixels differ: `mean |x[i, j+1] - x[i, j]| + mean |x[i+1, j] - x[i, j]|`.

    The measure that content-aware super-resolution routes patches by (CADyQ, arXiv 2207.10345, section 3.2).

    Args:
        images: float, shape (images, channels, height, width), at least two pixels each way.

    Returns:
        float32, shape (images,), in the unit of the pixels.

    Raises:
        OptionError: another shape or type.
    """
    if images.dim() != 4 or min(images.shape[2:]) < 2 or not images.is_floating_point():
        raise OptionError(
            f"a router needs float images (N, C, H, W) of at least 2 x 2 pixels; this input is {tuple(images.shape)} "
            f"of {images.dtype}"
        )
    across = (images[..., 1:] - images[..., :-1]).abs().flatten(1).mean(dim=1)
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1).mean(dim=1)
    return (across + down).float()


@dataclass(frozen=True)
class PatchRouter:
    """Sends a patch to the plan for hard patches where its gradient magnitude is above a threshold.

    Args:
        threshold: in the unit of the model's input, as float32 has it; infinity sends none there.

    Raises:
        OptionError: the threshold is no number.
    """

    threshold: float

    def __post_init__(self) -> None:
        if np.isnan(self.threshold):
            raise OptionError("a router's threshold is NaN; fit it on images without NaN")
        object.__setattr__(self, "threshold", float(np.float32(self.threshold)))

    def hard(self, images: Tensor) -> Tensor:
        """Return whether each image is a hard one, bool of shape (images,)."""
        return torch.gt(gradient_magnitude(images), self.threshold)
