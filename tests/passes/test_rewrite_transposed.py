"""Transposed convolutions as ordinary ones: equal to PyTorch's for every form."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.backends.int8 import kernel_report
from fxquant.capture import capture
from fxquant.core.ir import Sites, show
from fxquant.passes import Canonicalize, FoldBatchnorm, Pass, RewriteTransposed
from tests.models import Composed
from tests.programs import check_pass

aten = torch.ops.aten
LAYERS: dict[int, tuple[type[nn.Module], type[nn.Module]]] = {
    1: (nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.ConvTranspose2d, nn.BatchNorm2d),
}
FORMS: list[dict[str, Any]] = [
    {"kernel_size": k, "stride": s, "padding": p, "output_padding": e, "groups": g}
    for k, s, p, e, g in product((1, 2, 3, 4, 5), (1, 2, 3), (0, 1, 3), (0, 1), (1, 2))
    if e < s and (7 - 1) * s - 2 * p + k + e > 0
][::5]
FORMS += [
    {"kernel_size": 3, "dilation": 2, "padding": 1},
    {"kernel_size": 2, "dilation": 3, "padding": 4},
    {"kernel_size": 4, "groups": 4, "stride": 2, "padding": 1, "bias": False},
]
X = torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(0))


def images(axes: int) -> Tensor:
    return X if axes == 2 else X[..., 0]


def rewritten(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> Any:
    program = capture(model.eval(), inputs, **kwargs)
    steps: list[Pass] = [Canonicalize(), RewriteTransposed(), FoldBatchnorm()]
    for step in steps:
        program = check_pass(step, program)
    return program.module


@pytest.mark.parametrize("axes", [1, 2])
def test_every_form_equals_the_transposed_convolution(axes: int) -> None:
    torch.manual_seed(0)
    kind, _ = LAYERS[axes]
    layers = [kind(4, 8, **form) for form in FORMS]
    model = Composed(lambda self, x: [layer(x) for layer in self.layers], layers=nn.ModuleList(layers))
    module = rewritten(model, images(axes))
    assert "conv_transpose" not in show(module)
    for form, made, wanted in zip(FORMS, module(images(axes)), model(images(axes)), strict=True):
        assert made.shape == wanted.shape, form
        assert torch.allclose(made, wanted, atol=1e-5), form


@pytest.mark.parametrize("axes", [1, 2])
def test_norm_and_clip_are_folded_and_absorbed(axes: int) -> None:
    torch.manual_seed(0)
    layer, norm = LAYERS[axes]
    model = nn.Sequential(layer(4, 6, 4, 2, 1), norm(6), nn.ReLU6()).eval()
    for name in ("weight", "bias", "running_mean", "running_var"):
        nn.init.uniform_(getattr(model[1], name), 0.5, 1.5)
    module = rewritten(model, images(axes))
    assert torch.allclose(module(images(axes)), model(images(axes)), atol=1e-5)
    first, second, *_ = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert (first, second) == ((aten.conv1d if axes == 1 else aten.conv2d).default, aten.hardtanh.default)


def test_layers_that_share_a_weight_share_its_new_form() -> None:
    up, flat = nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(4, 4, 2)
    alone = Composed(lambda self, x: self.up(self.up(x)), up=up)
    module = rewritten(alone, X)
    assert [node.target for node in module.graph.nodes if node.op == "get_attr"] == ["up.weight", "up.bias"] * 2
    assert torch.allclose(module(X), alone(X), atol=1e-5)
    flat.weight = up.weight
    tied = Composed(
        lambda self, x: self.flat(self.up(x)) + F.conv_transpose2d(x, self.up.weight, None, 3)[..., :13, :15],
        up=up,
        flat=flat,
    )
    module = rewritten(tied, X)
    assert torch.allclose(module(X), tied(X), atol=1e-5)


def test_what_has_no_ordinary_form_stays() -> None:
    both = nn.ConvTranspose2d(4, 4, 3, 2, dilation=2)
    computed = Composed(lambda _, x: F.conv_transpose2d(x, x.mean(dim=(0, 2, 3)).reshape(4, 1, 1, 1)))
    for model in (both, computed):
        module = rewritten(model, X)
        assert "conv_transpose2d" in show(module)
        assert torch.equal(module(X), model(X))


def test_height_and_width_may_be_free() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    small, large = torch.randn(2, 3, 8, 8), torch.randn(1, 3, 5, 11)
    module = rewritten(model, small, dynamic_image=True)
    assert "pixel_shuffle" in show(module)
    assert torch.allclose(module(large), model(large), atol=1e-5)


@pytest.mark.parametrize("target", ["fx_int8", "onnxruntime"])
def test_runtimes_compute_it_on_integers(target: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 8, 4, 2, 1), nn.ReLU(),
                          nn.ConvTranspose2d(8, 3, 3, 2, 1, 1)).eval()  # fmt: skip
    result = fxquant.quantize(model, X, {"average_bits": 8}, effort="fast", target=target, progress=False)
    assert [site.name for site in result.program[Sites].sites] == ["0", "2", "4"]
    assert not result.program[Sites].refusals
    if target == "fx_int8":
        assert not [why for why in kernel_report(result.lowered).values() if why.startswith("float")]
    parity = fxquant.check(result, X)
    assert all(pair.within and pair.max_step < 0.01 for pair in parity.pairs)
    error = result.simulated(X) - model(X)
    assert 10 * torch.log10(model(X).square().mean() / error.square().mean()) > 25
