"""Real networks with real weights: one file per network, and NETWORKS, the table of what belongs to each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks import data
from benchmarks import preprocessing as prepare
from benchmarks.zoo.cifar_resnet import resnet20, resnet32
from benchmarks.zoo.deit import deit_tiny
from benchmarks.zoo.dscnn import dscnn
from benchmarks.zoo.efficientnet_lite0 import efficientnet_lite0
from benchmarks.zoo.imdn import imdn
from benchmarks.zoo.mobilenet_v1 import mobilenet_v1
from benchmarks.zoo.mobilenet_v2 import mobilenet_v2
from benchmarks.zoo.resnet8 import resnet8
from benchmarks.zoo.resnet18 import resnet18
from benchmarks.zoo.squeezenet import squeezenet
from fxquant.core.errors import OptionError


@dataclass(frozen=True)
class Network:
    """One network and what it needs to be measured.

    Args:
        factory: builds it in eval mode; reads the data folder unless the weights are random.
        input_shape: `(C, H, W)` of one input.
        preprocessing: maps raw images `(N, C, H, W)` to what the network takes.
        labelled: raw evaluation images and labels; None where the network has no labelled data.
        unlabelled: `count` raw calibration images, disjoint from the evaluation images.
    """

    factory: Callable[[], nn.Module]
    input_shape: tuple[int, int, int]
    preprocessing: data.Preprocessing
    labelled: Callable[[], data.Labelled] | None
    unlabelled: Callable[[int], Tensor]

    def evaluation(self, limit: int | None = None) -> data.Labelled:
        """Return preprocessed images `(N, *input_shape)` and labels `(N,)`, the first `limit` of them.

        Raises:
            FileFormatError: the data are missing.
            OptionError: the network has no labelled data.
        """
        if self.labelled is None:
            raise OptionError(f"{self.factory.__name__} has no labelled data; measure its outputs instead")
        images, labels = self.labelled()
        return self.preprocessing(images[:limit]), labels[:limit]

    def calibration(self, count: int = 128) -> Tensor:
        """Return preprocessed calibration images `(count, *input_shape)`.

        Raises:
            FileFormatError: the data are missing.
        """
        return self.preprocessing(self.unlabelled(count))


def _cifar(factory: Callable[[], nn.Module], preprocessing: data.Preprocessing) -> Network:
    return Network(factory, (3, 32, 32), preprocessing, lambda: data.cifar10("test"), data.cifar10_calibration)


def _imagenet(
    factory: Callable[[], nn.Module], preprocessing: data.Preprocessing, size: int = 224, labelled: bool = True
) -> Network:
    return Network(
        factory,
        (3, size, size),
        preprocessing,
        (lambda: data.imagenet_val(size=size)) if labelled else None,
        lambda count: data.imagenet_calibration(count, size),
    )


NETWORKS: dict[str, Network] = {
    "resnet20": _cifar(resnet20, prepare.imagenet_normalised),
    "resnet32": _cifar(resnet32, prepare.imagenet_normalised),
    "resnet8": _cifar(resnet8, prepare.unchanged),
    "mobilenet_v1": _imagenet(mobilenet_v1, prepare.minus_one_to_one),
    "mobilenet_v2": _imagenet(mobilenet_v2, prepare.minus_one_to_one),
    "efficientnet_lite0": _imagenet(efficientnet_lite0, prepare.centred_128),
    "deit_tiny": _imagenet(deit_tiny, prepare.imagenet_normalised),
    "squeezenet": _imagenet(squeezenet, prepare.caffe_bgr, size=227),
    "resnet18": _imagenet(resnet18, prepare.imagenet_normalised, labelled=False),
    "dscnn": Network(
        dscnn,
        (1, 49, 10),
        prepare.unchanged,
        lambda: data.keyword_maps("evaluation"),
        lambda count: data.keyword_maps("calibration")[0][:count],
    ),
    # Super-resolution has no labels: benchmarks.zoo.imdn.set5_psnr measures it, on crops of this size.
    "imdn": Network(
        imdn, (3, 112, 112), prepare.zero_to_one, None, lambda count: data.imagenet_calibration(count, 112)
    ),
}
