"""Images to score and to judge plans on: calibration images shifted, flipped and mixed in pairs.

A network answers the images it was trained on with near certainty, and then a quantized one does, too, until it is far
off: a KL of next to 0 that says little about the plan, and derivatives of next to 0 for scores. Between two images it
is as unsure as it is on images it has not seen. `benchmarks.verdict` compares what else can be done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.core.run.data import CalibrationSet
from fxquant.core.run.losses import Loss
from fxquant.core.run.task_losses import loss_of

REACH = 8
"""An image is moved by up to its side over this."""
FEW = 16
"""Images that are copied at a time."""
LEAST_SHARE = 0.25
"""Of either image in a mixture: with less, one of the two would be answered as if it were alone."""


def judging_images(
    images: CalibrationSet, loss: str | Loss, seed: int, moving: bool = True, only: Sequence[int] | None = None
) -> CalibrationSet:
    """Return as many images for scoring and judging plans: each moved, then mixed with another one.

    Scores gain by moving, verdicts on plans do not (`benchmarks.verdict`).

    The float answer to compare with is the network's answer to the mixed image. Images are returned as they are where
    the loss needs their labels or is not about classes, where an input holds integers, or where there is but one.

    Args:
        images: calibration images.
        loss: the loss, or its name.
        seed: of the shifts and pairs.
        moving: whether images are moved before they are mixed.
        only: positions of those to return; None for all.
    """
    if not can_mix(images, loss):
        return images if only is None or len(only) == len(images) else images.take(only)
    return CalibrationSet(tuple(mixed(moved(t, seed) if moving else t, seed, only) for t in images.inputs))


def can_mix(images: CalibrationSet, loss: str | Loss) -> bool:
    """Whether images are mixed in pairs where plans are judged by a loss; see `judging_images`."""
    floating = all(tensor.is_floating_point() for tensor in images.inputs)
    return loss_of(loss).judged_unsure and floating and len(images) > 1


def moved(images: Tensor, seed: int) -> Tensor:
    """Return images `(N, C, H, W)` shifted by up to an eighth of their side, edges reflected, and flipped by chance.

    Tensors of other ranks are returned as they are. Inputs of one size move alike for one seed.
    """
    if images.dim() != 4:
        return images
    generator = torch.Generator().manual_seed(seed)
    down, right = (side // REACH for side in images.shape[2:])
    padded = F.pad(images, (right, right, down, down), mode="reflect")
    crops = []
    for image in padded:
        top, left = (int(torch.randint(0, 2 * reach + 1, (), generator=generator)) for reach in (down, right))
        crop = image[:, top : top + images.shape[2], left : left + images.shape[3]]
        crops.append(crop.flip(-1) if float(torch.rand((), generator=generator)) < 0.5 else crop)
    return torch.stack(crops)


def mixed(images: Tensor, seed: int, only: Sequence[int] | None = None) -> Tensor:
    """Return `s x + (1 - s) x'` for each image x, its partner x' and a share s between .25 and .75 (arXiv 1710.09412).

    Args:
        images: floating point, shape (images, ...), at least two.
        seed: of partners and shares, which are the same for every tensor of as many images.
        only: positions of the mixtures to make, which are as they would be among all; None for all.
    """
    generator = torch.Generator().manual_seed(seed)
    ring = torch.randperm(len(images), generator=generator)
    partner = torch.empty_like(ring)
    # Neighbours on a random ring: nobody is mixed with itself.
    partner[ring] = ring.roll(1)
    drawn = torch.rand(len(images), generator=generator) * (1 - 2 * LEAST_SHARE) + LEAST_SHARE
    own = torch.arange(len(images)) if only is None else torch.as_tensor(list(only), dtype=torch.long)
    share = drawn[own].reshape(-1, *[1] * (images.dim() - 1)).to(images)
    # In place, partners a few at a time: hundreds of images are as large as a network.
    found, others = images[own.to(images.device)].mul_(share), partner[own].to(images.device)
    for start in range(0, len(found), FEW):
        few = slice(start, start + FEW)
        found[few] += images[others[few]].mul_(1 - share[few])
    return found
