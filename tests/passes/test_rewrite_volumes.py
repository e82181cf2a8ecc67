"""3-d convolutions and pools as 2-d ones: equal to PyTorch's for every form."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import fxquant
from fxquant.backends.int8 import kernel_report
from fxquant.capture import capture
from fxquant.core.ir import QuantizedEdges, Sites, show
from fxquant.passes import Canonicalize, FoldBatchnorm, Pass, RewriteTransposed, RewriteVolumes
from tests.models import Composed
from tests.programs import check_pass

aten = torch.ops.aten
X = torch.randn(2, 4, 5, 7, 6, generator=torch.Generator().manual_seed(0))
WIDE = X.repeat(1, 4, 1, 1, 1)


def drawn(count: int) -> list[dict[str, Any]]:
    """Return arguments of 3-d convolutions of 16 channels, drawn at random, of which `X` has enough pixels."""
    random, forms = Random(0), list[dict[str, Any]]()
    while len(forms) < count:
        names = {"kernel_size": (1, 2, 3), "stride": (1, 1, 2, 3), "padding": (0, 1, 2), "dilation": (1, 1, 2)}
        form: dict[str, Any] = {name: tuple(random.choices(values, k=3)) for name, values in names.items()}
        sides = (form[name] for name in ("kernel_size", "dilation", "padding"))
        reach = [(k - 1) * d + 1 - 2 * p for k, d, p in zip(*sides, strict=True)]
        if all(r <= size for r, size in zip(reach, X.shape[2:], strict=True)):
            forms.append({**form, "groups": random.choice((1, 1, 2)), "bias": random.random() < 0.5})
    return forms


FORMS = [
    *drawn(40),
    {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)},
    {"kernel_size": (3, 1, 1), "padding": (2, 0, 0), "stride": (2, 1, 1), "dilation": (2, 1, 1), "groups": 16},
    {"kernel_size": (1, 3, 3), "groups": 16},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "padding": 1},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (2, 3, 4), "padding": "same"},
    {"kernel_size": (2, 1, 1), "padding": "same"},
    {"kernel_size": (4, 2, 1), "padding": "same", "dilation": (1, 3, 1)},
    {"kernel_size": 2, "padding": "valid"},
]
POOLS: list[nn.Module] = [
    *(nn.MaxPool3d(k, s, p, d, ceil_mode=c) for k, s, p, d, c in (
        (2, None, 0, 1, False), (3, 2, 1, 1, True), ((1, 2, 2), None, 0, 1, False), ((3, 1, 1), 1, (1, 0, 0), 1, False),
        ((1, 1, 2), (2, 1, 1), 0, 1, False), (2, 1, 1, 2, False), ((2, 3, 2), (2, 2, 3), (1, 1, 0), 1, True),
    )),
    nn.AvgPool3d((1, 2, 3)), nn.AvgPool3d((1, 3, 3), (1, 2, 1), (0, 1, 1), count_include_pad=False, ceil_mode=True),
    nn.AdaptiveAvgPool3d(1), nn.AdaptiveAvgPool3d(2), nn.AdaptiveAvgPool3d((3, 1, 4)), nn.AdaptiveAvgPool3d((5, 2, 6)),
    Composed(lambda _, x: x.mean(dim=(2, 3, 4))),
    Composed(lambda _, x: x.mean((-1, 2, 3), True)),
    nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=(1, 1.5, 3)), nn.Upsample((15, 7, 9)),
]  # fmt: skip


def rewritten(model: nn.Module | ExportedProgram, *inputs: Tensor) -> Any:
    program = capture(model.eval() if isinstance(model, nn.Module) else model, inputs)
    steps: list[Pass] = [Canonicalize(), RewriteTransposed(), RewriteVolumes(), FoldBatchnorm()]
    for step in steps:
        program = check_pass(step, program)
    return program.module


def branches(layers: list[nn.Module]) -> nn.Module:
    return Composed(lambda net, x: [layer(x) for layer in net.layers], layers=nn.ModuleList(layers))


def test_every_form_equals_the_3d_convolution() -> None:
    torch.manual_seed(0)
    model = branches([nn.Conv3d(16, 16, **form) for form in FORMS])
    module = rewritten(model, WIDE)
    assert "conv3d" not in show(module)
    # The number of volumes is free.
    for volumes in (WIDE, WIDE[:1], torch.cat([WIDE, WIDE[:1]])):
        for form, made, wanted in zip(FORMS, module(volumes), model(volumes), strict=True):
            assert made.shape == wanted.shape, form
            assert torch.allclose(made, wanted, atol=1e-5), form


def test_every_pool_equals_the_3d_pool() -> None:
    model = branches(POOLS)
    module = rewritten(model, X)
    assert "3d" not in show(module)
    for pool, made, wanted in zip(POOLS, module(X), model(X), strict=True):
        assert made.shape == wanted.shape, pool
        assert torch.allclose(made, wanted, atol=1e-6), pool


def test_pools_that_have_no_form_on_slices_stay() -> None:
    pools = [nn.AvgPool3d(2), Composed(lambda _, x: x.mean(dim=(1, 2)))]
    module = rewritten(branches([*pools, nn.Upsample(scale_factor=(2.15, 1, 1))]), X)
    names = ("avg_pool3d", "mean", "upsample_nearest3d")
    assert [name for name in names if name not in show(module)] == []


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_3d_convolutions_too(groups: int) -> None:
    torch.manual_seed(0)
    forms: list[dict[str, Any]] = [
        {"kernel_size": k, "stride": s, "padding": p, "groups": groups}
        for k, s, p in product((2, 3, (4, 2, 3)), (1, 2, (1, 2, 2), (2, 1, 1), (2, 1, 3)), (0, 1))
    ]
    model = branches([nn.ConvTranspose3d(16, 4, **form) for form in forms])
    module = rewritten(model, WIDE)
    assert "3d" not in show(module)
    for form, made, wanted in zip(forms, module(WIDE), model(WIDE), strict=True):
        assert made.shape == wanted.shape, form
        assert torch.allclose(made, wanted, atol=1e-5), form


def test_slices_of_two_layers_are_taken_apart_once() -> None:
    model = nn.Sequential(nn.Conv3d(4, 6, 3, (2, 1, 1), padding=(1, 1, 1)), nn.BatchNorm3d(6), nn.ReLU(),
                          nn.Conv3d(6, 4, (2, 3, 3)), nn.MaxPool3d((1, 2, 2))).eval()  # fmt: skip
    model[1].running_var = torch.rand(6) + 0.5
    module = rewritten(model, X)
    assert torch.allclose(module(X), model(X), atol=1e-5)
    assert show(module) == "\n".join([
        "input_1 = input()",
        "permute_default = permute.default(input_1)",
        "reshape_default = reshape.default(permute_default)",
        "constant_pad_nd_default = constant_pad_nd.default(reshape_default)",
        "slice_tensor = slice.Tensor(constant_pad_nd_default)",
        "slice_tensor_1 = slice.Tensor(constant_pad_nd_default)",
        "slice_tensor_2 = slice.Tensor(constant_pad_nd_default)",
        "cat_default = cat.default(slice_tensor, slice_tensor_1, slice_tensor_2)",
        "reshape_default_1 = reshape.default(cat_default)",
        "conv2d_default = conv2d.default(reshape_default_1, 0.weight, 0.bias)",
        "relu_default = relu.default(conv2d_default)",
        "reshape_default_3 = reshape.default(relu_default)",
        "slice_tensor_3 = slice.Tensor(reshape_default_3)",
        "slice_tensor_4 = slice.Tensor(reshape_default_3)",
        "cat_default_1 = cat.default(slice_tensor_3, slice_tensor_4)",
        "reshape_default_4 = reshape.default(cat_default_1)",
        "conv2d_default_1 = conv2d.default(reshape_default_4, 3.weight, 3.bias)",
        "max_pool2d_default = max_pool2d.default(conv2d_default_1)",
        "reshape_default_7 = reshape.default(max_pool2d_default)",
        "permute_default_5 = permute.default(reshape_default_7)",
        "return permute_default_5",
    ])  # fmt: skip


def test_layers_that_share_a_weight_share_its_new_form() -> None:
    conv = nn.Conv3d(4, 4, 3, padding=1)
    alone = Composed(lambda net, x: net.conv(torch.relu(net.conv(x))), conv=conv)
    module = rewritten(alone, X)
    assert {node.target for node in module.graph.nodes if node.op == "get_attr"} == {"conv.weight", "conv.bias"}
    assert torch.allclose(module(X), alone(X), atol=1e-5)
    other = Composed(lambda net, x: net.conv(x) + net.conv.weight.sum(), conv=conv)
    module = rewritten(other, X)
    assert "conv.weight_planes" in show(module)
    assert torch.allclose(module(X), other(X), atol=1e-5)


def test_what_has_no_fast_form_stays() -> None:
    grouped = branches([nn.Conv3d(16, 16, 3, groups=4), nn.Conv3d(16, 32, (1, 3, 3), groups=16)])
    computed = Composed(lambda _, x: F.conv3d(x, x.mean(dim=(0, 2, 3, 4)).reshape(1, 16, 1, 1, 1)))
    transposed = nn.ConvTranspose3d(16, 16, 2, 2, groups=16)
    for model, count in ((grouped, 2), (computed, 1), (transposed, 1)):
        module = rewritten(model, WIDE)
        assert sum("3d" in str(node.target) for node in module.graph.nodes) == count
    sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC},)
    model = nn.Sequential(nn.Conv3d(4, 4, 3), nn.MaxPool3d((1, 2, 2))).eval()
    free = rewritten(export(model, (X,), dynamic_shapes=sizes), X)
    assert torch.equal(free(X[:, :, :4]), model(X[:, :, :4]))
    assert "conv3d" in show(free)
    assert "max_pool3d" in show(free)


REASONS: list[tuple[nn.Module, str]] = [
    (nn.AvgPool3d(2), "rounded twice"),
    (nn.Upsample(scale_factor=2, mode="trilinear"), "cuts off"),
    (nn.Upsample(scale_factor=1.5), "no whole number"),
    (nn.AdaptiveAvgPool3d(2), "only adaptive pooling to one pixel"),
    (nn.Conv3d(8, 8, 3, padding=1, groups=8), "fewer than 8 channels"),
    (nn.ConvTranspose3d(8, 8, 2, 2, groups=8), "fewer than 8 channels"),
]


@pytest.mark.slow
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize(("layer", "why"), REASONS, ids=lambda given: type(given).__name__)
def test_what_stays_in_float_says_why(layer: nn.Module, why: str, free: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 8, 8)
    model: Any = nn.Sequential(nn.Conv3d(3, 8, 1), nn.ReLU(), layer, nn.Conv3d(8, 4, 1)).eval()
    given = export(model, (x,), dynamic_shapes=(dict.fromkeys((0, 2, 3, 4), Dim.AUTO),)) if free else model
    made = fxquant.quantize(given, x, {"average_bits": 8}, bits=(8,), effort="fast", progress=False)
    reasons = {**made.program[QuantizedEdges].float_reasons, **made.program[Sites].refusals}
    assert (why if not free else "free sizes") in " ".join(reasons.values())
    made.to_onnx(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    other = torch.randn(2, 3, *(6, 10, 12) if free else (6, 8, 8))
    with torch.no_grad():
        wanted = made.simulated(other)
    (answer,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    off = (torch.from_numpy(answer) - wanted).abs()
    assert float(off.mean()) < 0.01 * float(wanted.abs().max())


def test_sums_and_clips_between_layers_are_computed_on_slices() -> None:
    first, second = nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)
    wide = nn.Conv3d(8, 2, (1, 3, 3))
    body = {"first": first, "second": second, "wide": wide, "last": nn.MaxPool3d((1, 2, 2))}

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.first(x)
        joined = torch.cat([torch.relu(y + net.second(y)), F.hardswish(y)], dim=1)
        answer: Tensor = net.last(net.wide(joined)) * torch.tanh(y.mean(dim=(1, 2, 3, 4), keepdim=True))
        return answer

    module = rewritten(model := Composed(forward, **body), X)
    assert torch.allclose(module(X), model(X), atol=1e-5)
    (added,) = (node for node in module.graph.nodes if node.target is aten.add.Tensor)
    (cat,) = (node for node in module.graph.nodes if node.target is aten.cat.default and node.args[1:] == (1,))
    assert [source.target for source in added.all_input_nodes] == [aten.conv2d.default] * 2
    assert [user.target for user in cat.users] == [aten.conv2d.default]
    # The input, and what is read besides the layers.
    assert sum(node.target is aten.permute.default for node in module.graph.nodes) == 3


class Volumes(nn.Module):
    """A network of every 3-d layer that takes a 2-d form: residual, both pools, a transposed one, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv3d(2, 8, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(8)
        self.time, self.space = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0)), nn.Conv3d(8, 8, 3, padding=1, bias=False)
        self.up, self.head = nn.ConvTranspose3d(8, 8, 2, 2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.space(torch.relu(self.time(x))))
        x = torch.cat([x, torch.relu(self.up(F.max_pool3d(x, 2)))], dim=1)
        answer: Tensor = self.head(F.adaptive_avg_pool3d(x, 1).flatten(1))
        return answer


@pytest.mark.parametrize("target", ["fx_int8", "onnxruntime"])
def test_runtimes_compute_it_on_integers(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Volumes().eval(), torch.randn(12, 2, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    quantize = partial(fxquant.quantize, effort="fast", target=target, progress=False)
    result = quantize(model, images, {"average_bits": 8})
    assert [site.name for site in result.program[Sites].sites] == ["stem", "time", "space", "up", "head"]
    assert not any(site.stored for site in result.program[Sites].sites)
    assert not result.program[Sites].refusals
    # Multiplications of the 3-d layer: outputs x channels x kernel.
    assert result.program[Sites].by_name("space").macs == 8 * 4 * 6 * 8 * 8 * 27
    parity = fxquant.check(result, images)
    assert all(pair.within and pair.max_step < 0.01 for pair in parity.pairs)
    error = result.simulated(images) - model(images)
    assert 10 * torch.log10(model(images).square().mean() / error.square().mean()) > 25
    if target == "fx_int8":
        assert not [why for why in kernel_report(result.lowered).values() if why.startswith("float")]
    else:
        result.to_onnx(tmp_path / "volumes.onnx")
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "volumes.onnx", options, providers=["CPUExecutionProvider"])
        ran = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
        assert ran.count("QLinearConv") == 4
        assert ran.count("NhwcMaxPool") == 2
        assert not {"Conv", "FusedConv", "ConvTranspose", "MaxPool", "ReduceMean"} & set(ran)
        (made,) = session.run(None, {session.get_inputs()[0].name: images[:3].numpy()})
        assert torch.allclose(torch.from_numpy(made), result.simulated(images)[:3], atol=1e-4)
    result.save(tmp_path / "result")
    assert torch.equal(fxquant.load(tmp_path / "result").simulated(images), result.simulated(images))
