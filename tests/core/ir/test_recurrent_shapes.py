from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from fxquant.backends.onnx import executable, to_onnx
from fxquant.capture import capture
from fxquant.core.ir import recurrent_shapes

# What torch says of every recurrent layer that it exports, and of projections.
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes|LSTM with projections:UserWarning")

LAYERS: list[Callable[[], nn.RNNBase]] = [
    lambda: nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True),
    lambda: nn.LSTM(4, 6, proj_size=3),
    lambda: nn.GRU(4, 6, num_layers=2, bidirectional=True),
    lambda: nn.GRU(4, 6, batch_first=True, bias=False),
    lambda: nn.RNN(4, 6, nonlinearity="relu"),
]


class Net(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        answer, states = self.layer(x)
        return (answer, *states) if isinstance(states, tuple) else (answer, states)


@pytest.mark.parametrize("make", LAYERS)
def test_what_is_returned_is_what_torch_would_return(make: Callable[[], nn.RNNBase]) -> None:
    layer = Net(make()).eval()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        x = mode.from_tensor(torch.ones(5, 7, 4))
        known = layer(x)
        with recurrent_shapes():
            found = layer(x)
        again = layer(x)
    for one, other, third in zip(known, found, again, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert third.shape == one.shape
    with recurrent_shapes(), torch.no_grad():
        real = layer(torch.ones(5, 7, 4))
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(real, layer(torch.ones(5, 7, 4)), strict=True))


def test_a_layer_that_is_taken_apart_is_computed() -> None:
    layer = Net(nn.LSTM(4, 6, batch_first=True)).eval()
    x = torch.randn(3, 5, 4)
    with recurrent_shapes():
        steps = torch.export.export(layer, (x,), dynamic_shapes=({0: Dim.AUTO},)).run_decompositions()
    assert not any("lstm" in str(node.target) for node in steps.graph.nodes)
    for one, other in zip(steps.module()(x), layer(x), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("make", LAYERS)
def test_capture_and_export_compute_no_step(make: Callable[[], nn.RNNBase], monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: object, **__: object) -> None:
        raise AssertionError("a step was computed to learn a shape")

    for name in ("one_layer_lstm", "gru_cell", "one_layer_rnn"):
        monkeypatch.setattr(torch._decomp.decompositions, name, computed)
    layer = Net(make()).eval()
    x = torch.randn(5, 6, 4)
    program = capture(layer, (x,))
    for one, other in zip(program.module(x), layer(x), strict=True):
        torch.testing.assert_close(one, other)
    if isinstance(layer.layer, nn.LSTM) and not layer.layer.proj_size:
        # The exporter has no form of others, and writes them step by step.
        torch.testing.assert_close(executable(to_onnx(program.module).SerializeToString())((x,)), layer(x)[0])
