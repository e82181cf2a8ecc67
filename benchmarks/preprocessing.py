"""What each network expects its pixels to look like: raw 0..255 `(N, C, H, W)` in, float32 of that shape out."""

from __future__ import annotations

import torch
from torch import Tensor

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_CAFFE_BGR_MEAN = (104.0, 117.0, 123.0)


def _per_channel(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


def imagenet_normalised(images: Tensor) -> Tensor:
    """Return `(x / 255 - mean) / std` with the ImageNet statistics."""
    return (images / 255.0 - _per_channel(_IMAGENET_MEAN)) / _per_channel(_IMAGENET_STD)


def minus_one_to_one(images: Tensor) -> Tensor:
    """Return `x / 127.5 - 1`, the range of the TensorFlow networks."""
    return images / 127.5 - 1.0


def centred_128(images: Tensor) -> Tensor:
    """Return `(x - 127) / 128`, the range of the EfficientNet-Lite networks."""
    return (images - 127.0) / 128.0


def caffe_bgr(images: Tensor) -> Tensor:
    """Return the channels as blue, green, red, each less its Caffe mean."""
    return images.flip(1) - _per_channel(_CAFFE_BGR_MEAN)


def zero_to_one(images: Tensor) -> Tensor:
    """Return `x / 255`."""
    return images / 255.0


def unchanged(images: Tensor) -> Tensor:
    """Return the images as they are, for networks that normalise inside."""
    return images
