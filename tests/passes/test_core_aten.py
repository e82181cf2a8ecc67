"""Programs that `run_decompositions` took apart into core ATen ops have the layers of the model they came from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

import fxquant
from fxquant import flow
from fxquant.capture import capture
from fxquant.core.facts import Settings
from fxquant.core.ir import Program, Sites, show
from fxquant.passes import Canonicalize

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ROWS = torch.rand(6, 5, 4, generator=torch.Generator().manual_seed(1))


class Layers(nn.Module):
    """Every layer that has another form in core ATen, attention among them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.pool = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.MaxPool2d(2)
        self.depthwise, self.groups = nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.GroupNorm(2, 8)
        self.up, self.tokens, self.layer_norm = nn.ConvTranspose2d(8, 4, 2, 2), nn.Linear(4, 16), nn.LayerNorm(16)
        self.read, self.head = nn.Linear(16, 48), nn.Linear(16, 5, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x = functional.relu6(self.norm(self.stem(image)))
        x = self.pool(functional.silu(self.groups(self.depthwise(x))))
        x = functional.adaptive_avg_pool2d(self.up(x), 4)
        x = self.layer_norm(self.tokens(x.flatten(2).transpose(1, 2)))
        q, k, v = self.read(x).view(x.shape[0], -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        found: Tensor = self.head(functional.gelu(x.mean(1)))
        return found


class Product(nn.Module):
    def __init__(self, compute: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.w, self.b)


def core(model: nn.Module, inputs: Tensor) -> ExportedProgram:
    exported = torch.export.export(model, (inputs[:2],), dynamic_shapes=({0: Dim.AUTO},))
    taken: ExportedProgram = exported.run_decompositions()
    return taken


def found(model: nn.Module | ExportedProgram, inputs: Tensor) -> Program:
    return flow.find_sites(capture(model, (inputs[:2],)), Settings(target="fx_int8"))


def test_a_core_program_is_quantized_like_its_model() -> None:
    torch.manual_seed(0)
    model = Layers().eval()
    results = [
        fxquant.quantize(each, IMAGES, None, bits=(8,), effort="fast", target="fx_int8", progress=False)
        for each in (model, core(model, IMAGES))
    ]
    assert [[site.name for site in each.program[Sites].sites] for each in results] == [
        ["stem", "depthwise", "up", "tokens", "read", "head"]
    ] * 2
    # The gradients that equalize channels are taken in other ops, so the factors may differ a little.
    with torch.no_grad():
        torch.testing.assert_close(results[0].simulated(IMAGES), results[1].simulated(IMAGES), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Conv1d(5, 6, 3, 2, 1, 2), ROWS),
        (nn.ConvTranspose1d(5, 6, 3, 2, 1, 1), ROWS),
        (nn.Conv2d(3, 6, (3, 1), (1, 2), (0, 1), groups=3), IMAGES),
        (nn.Linear(4, 3), ROWS),
        (nn.Linear(4, 3, bias=False), ROWS),
        (nn.Sequential(nn.Flatten(), nn.Linear(20, 3)), ROWS),
        (Product(lambda x, w, b: x @ w + b), ROWS),
        (Product(lambda x, w, b: b + x @ w.t()), ROWS),
        (Product(lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w).view(-1, 5, 4)), ROWS),
        (Product(lambda x, w, b: torch.bmm(x, w.t().expand(x.shape[0], 4, 4)) + b), ROWS),
        (Product(lambda x, w, b: functional.linear(x[:, None].transpose(2, 3)[..., :4], w, b)), ROWS),
    ],
)
def test_one_layer_in_either_form(layer: nn.Module, inputs: Tensor) -> None:
    layer = layer.eval()
    for model in (layer, core(layer, inputs)):
        program = found(model, inputs)
        assert len(program[Sites].sites) == 1
        torch.testing.assert_close(program.module(inputs), layer(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w, alpha=2),
        lambda x, w, _: x[:, 0] @ w.expand(3, 4, 4),
        lambda x, w, _: w @ x[:, :4],
    ],
    ids=["scaled", "a product for each of three", "parameter in front"],
)
def test_what_is_no_linear_layer_stays_what_it_is(compute: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    layer = Product(compute)
    program = flow.run(capture(layer, (ROWS[:2],)), Canonicalize())
    assert "linear" not in show(program.module)
    torch.testing.assert_close(program.module(ROWS), layer(ROWS))


def test_a_vector_that_others_read_too_stays_an_addition() -> None:
    def compute(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w
        return y + b, y

    layer = Product(compute)  # type: ignore[arg-type]
    program = found(layer, ROWS)
    for one, other in zip(program.module(ROWS), layer(ROWS), strict=True):
        torch.testing.assert_close(one, other)


def test_the_second_result_of_a_pool_keeps_it_as_it_is() -> None:
    class Indices(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return functional.max_pool2d(x, 2, return_indices=True)

    program = flow.run(capture(Indices(), (IMAGES[:2],)), Canonicalize())
    for one, other in zip(program.module(IMAGES), Indices()(IMAGES), strict=True):
        assert torch.equal(one, other)
