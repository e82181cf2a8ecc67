"""Numbers at the edge of what computers hold, through the public path: the right answer in every runtime, or one error.

Right is what the plan says: the exact reference's integers in each runtime, the simulation to a step, all of it finite.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import fxquant
from fxquant.backends import backend
from fxquant.core.errors import CalibrationError, CaptureError, FxquantError
from fxquant.core.ir import SMALLEST_SCALE, FakeQuantize
from fxquant.parity import check
from fxquant.result import Result
from tests.small import SmallNet, images

LARGEST_STEP = 2.5
"""Steps of 1/255 of the range that an answer may be off the simulation, as for every backend."""


class NormNet(SmallNet):
    """With a batch norm behind the first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(torch.relu(self.norm(self.stem(x)))))
        scores: Tensor = self.head(x.mean(dim=(2, 3)))
        return scores


class Around(nn.Module):
    """Something before or behind the network."""

    def __init__(self, before: Callable[[Tensor], Tensor], behind: Callable[[Tensor], Tensor] = torch.clone) -> None:
        super().__init__()
        self.inner, self.before, self.behind = network(), before, behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.inner(self.before(x)))


def network(**changes: Callable[[Tensor], Tensor]) -> SmallNet:
    """Return the small network, named tensors changed (`stem_weight=...`); a batch norm where one is named."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = NormNet() if any(name.startswith("norm") for name in changes) else SmallNet()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    state = model.state_dict()
    for name, change in changes.items():
        tensor = state[name.replace("_", ".", 1)]
        tensor.copy_(change(tensor.clone()))
    return model.eval()


def to(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor * factor


def channel(value: float) -> Callable[[Tensor], Tensor]:
    """Set the first channel."""
    return lambda tensor: torch.cat([torch.full_like(tensor[:1], value), tensor[1:]])


def spread(tensor: Tensor) -> Tensor:
    """Give each channel another order of magnitude, 1e-8 to 1e7."""
    powers = torch.linspace(-8, 7, len(tensor)).pow(1)
    return tensor * (10.0**powers).reshape([-1] + [1] * (tensor.dim() - 1))


def with_head(make: Callable[[], Tensor]) -> SmallNet:
    model = network()
    model.head.weight = nn.Parameter(make())
    return model


def overlapping() -> SmallNet:
    """Return the network with two weights that share some of one storage."""
    model, storage = network(), torch.randn(260, generator=torch.Generator().manual_seed(5))
    model.stem.weight = nn.Parameter(storage[:36].view(4, 1, 3, 3))
    model.body.weight = nn.Parameter(storage[20:236].view(6, 4, 3, 3))
    return model


def parametrized(wrap: Callable[[nn.Module], object]) -> SmallNet:
    model = network()
    _ = wrap(model.body)
    return model.eval()


def wide() -> SmallNet:
    """Return the network for five channels, its weights with the channels last."""
    model = network()
    model.stem = nn.Conv2d(5, 4, 3, padding=1)
    for layer in (model.stem, model.body):
        layer.weight = nn.Parameter(layer.weight.detach().contiguous(memory_format=torch.channels_last))
    return model


def quantized(model: nn.Module, data: object) -> Result:
    cheap = {"estimators": ("weight_mse",), "threads": 1}
    return fxquant.quantize(model, data, None, bits=(4, 8), effort="fast", progress=False, options=cheap)


Case = tuple[Callable[[], nn.Module], Callable[[], object]]

RIGHT: dict[str, Case] = {
    "denormal weights": (lambda: network(body_weight=times(1e-40), body_bias=to(0.0)), images),
    "denormal images": (network, lambda: images() * 1e-40),
    "images of zeros": (network, lambda: images() * 0.0),
    "constant images": (network, lambda: images() * 0.0 + 3.0),
    "negative images": (network, lambda: -images().abs() - 1.0),
    "huge images": (network, lambda: images() * 1e30),
    "tiny images": (lambda: network(stem_bias=to(0.0)), lambda: images() * 1e-30),
    "huge weights": (lambda: network(body_weight=times(1e30)), images),
    "tiny weights": (lambda: network(stem_weight=times(1e-30), stem_bias=to(0.0)), images),
    "an outlier of a million": (network, lambda: torch.cat([images(), images(1) * 1e6])),
    "channels of 1e-8 to 1e7": (lambda: network(body_weight=spread), images),
    "constant channel": (lambda: network(body_weight=channel(0.0), body_bias=channel(7.25)), images),
    "everything is zero": (lambda: network(stem_weight=to(0.0), body_weight=to(0.0), head_weight=to(0.0)), images),
    "dead activations": (lambda: network(stem_bias=to(-1e3)), images),
    "bias beyond int32": (lambda: network(body_bias=to(1e9)), images),
    "bias of a channel beyond int32": (lambda: network(body_weight=channel(1e-8), body_bias=channel(100.0)), images),
    "bias below int32": (lambda: network(head_bias=to(-1e9)), images),
    "variance of 0": (lambda: network(norm_running_var=to(0.0)), images),
    "variance without end": (lambda: network(norm_running_var=to(torch.inf)), images),
    "factor of 0": (lambda: network(norm_weight=to(0.0)), images),
    "one pixel": (network, lambda: images()[:, :, :1, :1]),
    "batches of one": (network, lambda: [images()[k : k + 1] for k in range(24)]),
    "ragged batches, one of them empty": (network, lambda: [images()[:16], images()[:0], images()[16:19]]),
    "channels last": (wide, lambda: five(torch.channels_last)),
    "transposed weight": (lambda: with_head(lambda: torch.randn(6, 3).t()), images),
    "expanded weight": (lambda: with_head(lambda: torch.randn(3, 1).expand(3, 6)), images),
    "sliced weight": (lambda: with_head(lambda: torch.randn(3, 12)[:, ::2]), images),
    "weights that overlap": (overlapping, images),
    "weight norm": (lambda: parametrized(parametrizations.weight_norm), images),
    "spectral norm": (lambda: parametrized(parametrizations.spectral_norm), images),
    "integer images": (lambda: Around(lambda x: x.float() / 255.0), lambda: (images() * 50 + 100).to(torch.uint8)),
    "bytes with channels last": (
        lambda: Around(lambda x: x.permute(0, 3, 1, 2).float() / 255.0),
        lambda: (images() * 50 + 100).to(torch.uint8).permute(0, 2, 3, 1).contiguous(),
    ),
    "half images": (lambda: Around(Tensor.float), lambda: images().half()),
    "images with gradients": (network, lambda: images().requires_grad_()),
    "double answer": (lambda: Around(torch.clone, Tensor.double), images),
}


def five(layout: torch.memory_format) -> Tensor:
    return torch.randn(24, 5, 8, 8, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)


SHORT = (
    *("denormal weights", "tiny weights", "huge images", "channels of 1e-8 to 1e7", "constant channel"),
    *("everything is zero", "bias beyond int32", "variance without end", "one pixel", "transposed weight"),
    *("ragged batches, one of them empty", "weights that overlap", "weight norm", "bytes with channels last"),
)
"""Cases of every run; `FXQUANT_FUZZ` set to anything runs all."""


@pytest.mark.parametrize("name", RIGHT if "FXQUANT_FUZZ" in os.environ else SHORT)
def test_every_runtime_computes_the_plan(name: str) -> None:
    model, data = RIGHT[name]
    result = quantized(model(), data())
    found = check(result, threads=1)
    for pair in found.pairs:
        assert pair.within, pair
        if pair.reference == "exact":
            assert pair.max_step == 0 or pair.layer_step < 0.01, pair
        assert pair.mean_step <= LARGEST_STEP, pair
    answers = [graph(*result.example) for graph in (result.simulated, result.lowered, fxquant.lower(result, "fx_int8"))]
    answers.append(backend("onnxruntime").compile(result.simulated, result.example, 1)(result.example))
    assert all(bool(torch.isfinite(answer).all()) for answer in answers)
    scales = [m.scale for m in result.simulated.modules() if isinstance(m, FakeQuantize)]
    assert len(scales) >= 4
    assert all(bool((torch.isfinite(scale) & (scale >= SMALLEST_SCALE / 2)).all()) for scale in scales)


def test_a_channel_without_weights_is_its_bias_exactly() -> None:
    result = quantized(network(head_weight=channel(0.0), head_bias=channel(3.25)), images())
    answer = fxquant.lower(result, "fx_int8")(*result.example)[:, 0]
    # To one step of the accumulator, whose grid is far finer than float32 shows here.
    assert torch.allclose(answer, torch.full_like(answer, 3.25), rtol=1e-3)
    assert torch.equal(answer, answer[:1].expand_as(answer))


def overflow(one: str, other: str, value: float) -> Callable[[], nn.Module]:
    return lambda: network(**{one: to(value), other: to(value)})


def sparse() -> nn.Module:
    return with_head(lambda: torch.randn(3, 6).to_sparse())


ANSWER = "answer of the model is not finite"
REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], object], type[FxquantError], str]] = {
    "NaN image": (network, lambda: with_value(torch.nan), CalibrationError, "first in image 24; remove or repair it"),
    "infinite image": (network, lambda: with_value(torch.inf), CalibrationError, "first in image 24"),
    "image near the largest float": (network, lambda: images() * 5e37, CalibrationError, "value 'x' is not finite"),
    "NaN weight": (lambda: network(body_weight=to(torch.nan)), images, CaptureError, "'body.weight' holds 216"),
    "infinite bias": (lambda: network(head_bias=to(torch.inf)), images, CaptureError, "'head.bias' holds 3"),
    "NaN statistics": (lambda: network(norm_running_mean=to(torch.nan)), images, CaptureError, "'norm.running_mean'"),
    "infinite mean": (lambda: network(norm_running_mean=to(-torch.inf)), images, CaptureError, "statistics are broken"),
    "negative variance": (lambda: network(norm_running_var=to(-1.0)), images, CaptureError, "statistics are broken"),
    "overflow inside": (
        overflow("stem_weight", "body_weight", 1e30),
        images,
        CalibrationError,
        "'relu_1' is not finite",
    ),
    "NaN inside": (lambda: Around(torch.log), images, CalibrationError, "value 'log' is not finite"),
    "overflow of the answer": (overflow("head_weight", "head_bias", 3e38), images, CalibrationError, ANSWER),
    "NaN answer": (lambda: Around(torch.clone, torch.log), images, CalibrationError, ANSWER),
    "half model": (lambda: network().half(), lambda: images().half(), CaptureError, "is float16.*model.float()"),
    "bfloat16 model": (lambda: network().bfloat16(), images, CaptureError, "is bfloat16.*model.float()"),
    "double model": (lambda: network().double(), lambda: images().double(), CaptureError, "is float64"),
    "bfloat16 images": (network, lambda: images().bfloat16(), CalibrationError, r"are bfloat16.*\.float\(\)"),
    "double images": (network, lambda: images().double(), CaptureError, "and type float64"),
    "bytes that are not converted": (network, lambda: images().to(torch.uint8), CaptureError, "and type uint8"),
    "no images": (network, lambda: images()[:0], CalibrationError, "holds no images"),
    "one image": (network, lambda: images(1), CalibrationError, "holds one image"),
    "five channels": (network, lambda: five(torch.contiguous_format), CaptureError, "to have 1 channels, but got 5"),
    "another shape later": (network, lambda: [images(), torch.zeros(2, 1, 9, 9)], CalibrationError, "fit together"),
    "meta images": (network, lambda: images().to("meta"), CalibrationError, "has no values"),
    "meta model": (lambda: network().to("meta"), images, CaptureError, "has no values"),
    "sparse images": (network, lambda: images().to_sparse(), CalibrationError, "stored sparsely"),
    "sparse weight": (sparse, images, CaptureError, "'head.weight' is stored sparsely"),
}


def with_value(value: float) -> Tensor:
    return torch.cat([images(), torch.full((1, 1, 8, 8), value)])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_one_error(name: str) -> None:
    model, data, kind, shown = REFUSED[name]
    with pytest.raises(kind, match=shown):
        quantized(model(), data())


@pytest.mark.parametrize(
    "data", [torch.zeros(4, 1, 9, 9, 2), torch.zeros(4, 2, 8, 8), torch.zeros(4, 1, 8, 8).double()]
)
def test_other_images_later_are_one_error(data: Tensor) -> None:
    result = quantized(network(), images())
    with pytest.raises(FxquantError, match="input 'x' takes float32 of"):
        check(result, data)


def test_functional_layers_at_one_pixel() -> None:
    class OnePixel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 1, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = functional.conv2d(x, self.weight, padding=2, dilation=2, stride=3)
            return functional.adaptive_avg_pool2d(x, 1).flatten(1)

    result = quantized(OnePixel().eval(), images()[:, :, :2, :2])
    assert check(result, threads=1).within
