"""Functions of one value between two grids are read from tables, to the same integers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.backends.int8 import Dequantize, Lookup, Quantize, look_up

IMAGES = torch.randn(8, 3, 9, 7, generator=torch.Generator().manual_seed(0))

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky": lambda y: F.leaky_relu(y, 0.1),
    "gelu": F.gelu,
    "elu": F.elu,
    "hard-swish, doubled": lambda y: 2 * F.hardswish(y) + 1,
    "mish by hand": lambda y: y * torch.tanh(F.softplus(y)),
    "one of two": lambda y: torch.where(y > 0, y, y * 0.3),
}


class Net(nn.Module):
    """Two convolutions with a function between them, at a resolution of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor], also: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)
        self.function, self.also = function, also

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        # A maximum over windows between them keeps the convolution from computing the function itself.
        y = F.max_pool2d(self.one(x), 2)
        z = self.function(y)
        return (self.two(z), z) if self.also else self.two(z)


def result_of(model: nn.Module) -> fxquant.Result:
    torch.manual_seed(1)
    return fxquant.quantize(model, IMAGES, "average_bits=8", bits=(8,), effort="fast", progress=False)


def modules(graph: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in graph.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_integers_by_a_table(name: str) -> None:
    torch.manual_seed(0)
    result = result_of(Net(FUNCTIONS[name]).eval())
    lowered = fxquant.lower(result, "fx_int8")
    with torch.no_grad():
        torch.testing.assert_close(lowered(IMAGES), result.simulated(IMAGES), rtol=0, atol=2e-5)
    (table,) = modules(lowered, Lookup)
    assert isinstance(table, Lookup)
    q = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    for each in (q, q.contiguous(memory_format=torch.channels_last), q.transpose(1, 3), q[:, ::2], q[0, 0, 0]):
        found = table(each)
        assert torch.equal(found, table.function(each))
        assert found.shape == each.shape
    assert table(q.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_a_product_with_its_own_gate_is_one_table() -> None:
    torch.manual_seed(0)
    model = Net(F.silu).eval()
    result = fxquant.quantize(model, IMAGES, "average_bits=8", bits=(8,), effort="fast", target="onnxruntime")
    lowered = fxquant.lower(result, "fx_int8")
    used = [lowered.get_submodule(str(node.target)) for node in lowered.graph.nodes if node.op == "call_module"]
    assert not [module for module in used if type(module).__name__ == "IntegerMul"]
    (table,) = (module for module in used if isinstance(module, Lookup))
    # The same integers as the sigmoid's table and the product make.
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(table(every), table.function(every))
    with torch.no_grad():
        off = (lowered(IMAGES) - result.simulated(IMAGES)).abs().max() / result.simulated(IMAGES).abs().max()
    assert float(off) < 0.03
    assert all(pair.within for pair in fxquant.check(result, IMAGES).pairs)


def test_what_is_read_in_float_too_stays_in_float() -> None:
    torch.manual_seed(0)
    lowered = fxquant.lower(result_of(Net(F.gelu, also=True).eval()), "fx_int8")
    assert not modules(lowered, Lookup)
    assert modules(lowered, Dequantize)
    assert modules(lowered, Quantize)
    before = copy.deepcopy(lowered.graph)
    look_up(lowered)
    assert str(before) == str(lowered.graph)


def test_compilers_get_the_steps() -> None:
    torch.manual_seed(0)
    result = result_of(Net(F.elu).eval())
    lowered = fxquant.lower(result, "fx_int8")
    exported = torch.export.export(lowered, (IMAGES,))
    assert any("elu" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(IMAGES), lowered(IMAGES), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("slopes", "expected"),
    [([0.25], {"LeakyRelu"}), ([0.0, 0.1, 1.0, 0.3, 0.2, 0.5], {"Max"}), ([-0.5, 0.1, 2.0, 0.3, 0.2, 0.5], {"Sub"})],
)
def test_slopes_of_a_prelu(slopes: list[float], expected: set[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    act = nn.PReLU(len(slopes))
    act.weight.data = torch.tensor(slopes)
    result = result_of(Net(act).eval())
    path = tmp_path / "model.onnx"
    _ = result.to_onnx(path)
    ops = {node.op_type for node in onnx.load(path).graph.node}
    assert ops >= expected
    assert "PRelu" not in ops
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), result.simulated(IMAGES).detach(), rtol=0, atol=2e-5)
