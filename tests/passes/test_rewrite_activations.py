"""SiLU as a product, where the target has kernels of both factors, and the grid of the sigmoid's values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.backends import backend
from fxquant.capture import capture
from fxquant.core.facts import Ranges
from fxquant.core.ir import QuantizedEdges, show
from fxquant.passes import RewriteActivations
from tests.programs import check_pass

TARGET = backend("onnxruntime").target
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Gated(nn.Module):
    """Squeeze and excitation between convolutions, and a split."""

    def __init__(self, gate: str) -> None:
        super().__init__()
        self.gate = gate
        self.first, self.down, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.inner, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        gate = torch.sigmoid if self.gate == "sigmoid" else F.hardsigmoid
        x = x * gate(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        one, other = x.chunk(2, 1)
        answer: Tensor = self.last(torch.cat([one, F.silu(self.inner(other))], 1))
        return answer


def test_silu_is_x_times_its_sigmoid() -> None:
    program = capture(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 1)).eval(), (X,))
    done = check_pass(RewriteActivations(TARGET), program)
    assert "sigmoid_default = sigmoid.default(conv2d)\nsilu = mul.Tensor(conv2d, sigmoid_default)" in show(done.module)
    torch.testing.assert_close(done.module(X), program.module(X))
    assert done.log[-1].rewrites == 1


@pytest.mark.parametrize("missing", ["sigmoid", "mul"])
def test_it_stays_where_a_factor_has_no_kernel(missing: str) -> None:
    program = capture(nn.SiLU(), (X,))
    target = replace(TARGET, joins=TARGET.joins - {missing})
    assert check_pass(RewriteActivations(target), program).log[-1].rewrites == 0


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
def test_gates_and_their_products_run_on_integers(gate: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Gated(gate).eval()
    made = fxquant.quantize(model, X, {"average_bits": 8}, effort="fast", target="onnxruntime", progress=False)
    ranges = made.program[Ranges]
    assert len(ranges.factors) == 2
    for name in ranges.factors:
        grid = ranges.grid([name], 8)
        assert float(grid.scale) == pytest.approx(ranges.histograms[name].maximum / 255), "no end is clipped"
        assert int(grid.zero_point) == 0
        assert name in made.program[QuantizedEdges].integer_nodes
    again = Ranges.load(_saved(ranges, tmp_path))
    assert again.factors == ranges.factors
    made.to_onnx(tmp_path / "net.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(tmp_path / "net.onnx", options, providers=["CPUExecutionProvider"])
    ran = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert ran.count("QLinearMul") == 2
    assert ran.count("QLinearSigmoid") == 1 + (gate == "sigmoid")
    # The image and the answer, and a hard sigmoid of single pixels.
    assert ran.count("QuantizeLinear") == 1 + (gate != "sigmoid")
    parity = fxquant.check(made, X)
    assert all(pair.within for pair in parity.pairs), parity
    with torch.no_grad():
        off = (made.simulated(X) - model(X)).square().mean() / model(X).square().mean()
    assert float(off) < 10**-3


def _saved(ranges: Ranges, folder: Path) -> Path:
    ranges.save(folder / "ranges.npz")
    return folder / "ranges.npz"
