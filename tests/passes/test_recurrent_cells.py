"""Recurrent cells as linear layers and gates: equal to PyTorch's, and on integers in both runtimes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.int8 import kernel_report
from fxquant.backends.onnx import kernel_report as file_report
from fxquant.capture import capture
from fxquant.core.ir import Program, QuantizedEdges, Sites, show
from fxquant.passes import Canonicalize, FindEdges
from tests.models import Composed
from tests.programs import TARGET, check_pass

INPUT, HIDDEN = 6, 5
X = torch.randn(24, INPUT, generator=torch.Generator().manual_seed(0))
H, C = torch.randn(2, 24, HIDDEN, generator=torch.Generator().manual_seed(1))

CELLS: dict[str, Callable[..., nn.RNNCellBase]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn tanh": nn.RNNCell,
    "rnn relu": partial(nn.RNNCell, nonlinearity="relu"),
}


class Step(nn.Module):
    """A cell; those of one state return what an LSTM has as its second one as it is."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        states = self.cell(x, (h, c) if isinstance(self.cell, nn.LSTMCell) else h)
        return states if isinstance(states, tuple) else (states, c)


class Several(nn.Module):
    """A function of named layers, and of inputs with the states `h` and `c`."""

    def __init__(self, answer: Callable[..., list[Tensor]], **layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.answer = nn.ModuleDict(layers), answer

    def forward(self, x: Tensor, h: Tensor, c: Tensor | None = None) -> list[Tensor]:
        return self.answer(self.layers, x, h) if c is None else self.answer(self.layers, x, h, c)


def canonical(model: nn.Module, *inputs: Tensor) -> Program:
    done = check_pass(Canonicalize(), capture(model.eval(), inputs))
    assert check_pass(Canonicalize(), done).log[-1].rewrites == 0
    return done


def equal(model: nn.Module, *inputs: Tensor) -> Program:
    """Return the canonical program, which must answer as the model, for other batches too."""
    done = canonical(model, *inputs)
    for given in (inputs, tuple(x[:1] for x in inputs)):
        with torch.no_grad():
            for made, wanted in zip(done.module(*given), model(*given), strict=True):
                torch.testing.assert_close(made, wanted, atol=1e-6, rtol=0)
    assert "_cell" not in {str(node.target).removesuffix(".default")[-5:] for node in done.module.graph.nodes}
    return done


GOLDEN = {
    "lstm": """\
x = x()
h = h()
c = c()
linear_default = linear.default(x, cell.weight_ih, cell.bias_ih)
linear_default_1 = linear.default(h, cell.weight_hh, cell.bias_hh)
add_tensor = add.Tensor(linear_default, linear_default_1)
slice_tensor = slice.Tensor(add_tensor)
slice_tensor_1 = slice.Tensor(add_tensor)
slice_tensor_2 = slice.Tensor(add_tensor)
slice_tensor_3 = slice.Tensor(add_tensor)
sigmoid_default = sigmoid.default(slice_tensor_1)
mul_tensor = mul.Tensor(sigmoid_default, c)
sigmoid_default_1 = sigmoid.default(slice_tensor)
tanh_default = tanh.default(slice_tensor_2)
mul_tensor_1 = mul.Tensor(sigmoid_default_1, tanh_default)
add_tensor_1 = add.Tensor(mul_tensor, mul_tensor_1)
sigmoid_default_2 = sigmoid.default(slice_tensor_3)
tanh_default_1 = tanh.default(add_tensor_1)
mul_tensor_2 = mul.Tensor(sigmoid_default_2, tanh_default_1)
return mul_tensor_2, add_tensor_1""",
    "rnn relu": """\
x = x()
h = h()
c = c()
linear_default = linear.default(x, cell.weight_ih, cell.bias_ih)
linear_default_1 = linear.default(h, cell.weight_hh, cell.bias_hh)
add_tensor = add.Tensor(linear_default, linear_default_1)
relu_default = relu.default(add_tensor)
return relu_default, c""",
}


@pytest.mark.parametrize("kind", list(GOLDEN))
def test_before_and_after(kind: str) -> None:
    net = Step(CELLS[kind](INPUT, HIDDEN))
    before = show(capture(net.eval(), (X, H, C)).module)
    name = {"lstm": "lstm_cell", "rnn relu": "rnn_relu_cell"}[kind]
    assert f"{name} = {name}.default(x, h" in before
    assert show(canonical(net, X, H, C).module) == GOLDEN[kind]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", list(CELLS))
def test_every_kind_equals_the_cell(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    done = equal(Step(CELLS[kind](INPUT, HIDDEN, bias=bias)), X, H, C)
    # Patterns such as type:LSTMCell, and reports, ask where a node comes from.
    made = [node for node in done.module.graph.nodes if node.op == "call_function"]
    assert all("nn_module_stack" in node.meta and "stack_trace" in node.meta for node in made)


@pytest.mark.parametrize("kind", list(CELLS))
def test_steps_share_the_weights_and_the_first_has_no_state(kind: str) -> None:
    torch.manual_seed(1)

    def forward(net: Any, x: Tensor) -> list[Tensor]:
        states = net.cell(x)
        for _ in range(2):
            states = net.cell(x.flip(1), states)
        return [*states] if isinstance(states, tuple) else [states]

    done = equal(Composed(forward, cell=CELLS[kind](INPUT, HIDDEN)), X)
    assert show(done.module).count("linear.default") == 6
    assert set(dict(done.module.named_parameters())) == {
        f"cell.{p}" for p in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }


def test_one_of_the_biases_or_of_the_states_may_be_missing() -> None:
    torch.manual_seed(2)

    def gru(net: Any, x: Tensor, h: Tensor) -> list[Tensor]:
        parameters = (net.cell.weight_ih, net.cell.weight_hh)
        biases = (net.cell.bias_ih, None), (None, net.cell.bias_hh)
        return [torch.gru_cell(x, h, *parameters, *pair) for pair in biases]

    equal(Several(gru, cell=nn.GRUCell(INPUT, HIDDEN)), X, H)
    cell = nn.LSTMCell(INPUT, HIDDEN)
    equal(Several(lambda net, x, h: [net.cell(x, (h, h))[1]], cell=cell), X, H)
    equal(Several(lambda net, x, h, c: [net.cell(x, (h, c))[0]], cell=cell), X, H, C)


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(3)
    cell = nn.RNNCell(HIDDEN, HIDDEN)
    head = nn.Linear(HIDDEN, HIDDEN)
    cell.weight_ih = cell.weight_hh = head.weight
    done = equal(Several(lambda net, x, h: [net.head(net.cell(x, h))], cell=cell, head=head), H, C)
    read = {node.target for node in done.module.graph.nodes if node.op == "get_attr" and "weight" in node.target}
    assert len(read) == 1


def test_computed_weights_stay_cells() -> None:
    torch.manual_seed(4)
    net = Several(
        lambda net, x, h: [torch.rnn_tanh_cell(x, h, net.cell.weight_ih * x.mean(), net.cell.weight_hh)],
        cell=nn.RNNCell(INPUT, HIDDEN),
    )
    done = canonical(net, X, H)
    assert "rnn_tanh_cell.default" in show(done.module)
    reasons = FindEdges(TARGET)(done)[QuantizedEdges].float_reasons
    assert "weights are computed" in reasons["rnn_tanh_cell"]
    with torch.no_grad():
        torch.testing.assert_close(done.module(X, H)[0], net(X, H)[0])


@pytest.mark.parametrize(("kind", "target"), [("lstm", "fx_int8"), ("gru", "onnxruntime")])
def test_runtimes_compute_the_products_on_integers(kind: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    cell = CELLS[kind](INPUT, 16)

    def forward(net: Any, x: Tensor) -> Tensor:
        states = net.cell(x)
        states = net.cell(x.flip(1), states)
        hidden: Tensor = net.head(states[0] if isinstance(states, tuple) else states)
        return hidden

    net = Composed(forward, cell=cell, head=nn.Linear(16, 3)).eval()
    result = fxquant.quantize(net, X, {"average_bits": 8}, bits=(4, 8), effort="fast", target=target, progress=False)
    assert [site.name for site in result.program[Sites].sites] == ["cell.weight_ih", "cell.weight_hh", "head"]
    assert not result.program[Sites].refusals
    if target == "fx_int8":
        assert not [why for why in kernel_report(result.lowered).values() if why.startswith("float")]
    else:
        assert not file_report(result.to_onnx(tmp_path / "net.onnx").path).float_layers
    parity = fxquant.check(result, X)
    assert all(pair.within and pair.max_step < 0.01 for pair in parity.pairs), parity
    with torch.no_grad():
        wanted, made = net(X), result.lowered(X)
    assert 10 * torch.log10(wanted.square().mean() / (made - wanted).square().mean()) > 25


def test_weights_are_stored_at_their_width(tmp_path: Path) -> None:
    torch.manual_seed(6)
    net = Step(nn.LSTMCell(INPUT, HIDDEN)).eval()
    result = fxquant.quantize(net, [(X, H, C)], None, bits=(4,), effort="fast", target="onnxruntime", progress=False)
    file = onnx.load(result.to_onnx(tmp_path / "net.onnx").path)
    kept = [t for t in file.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert sum(prod(t.dims) for t in kept) == 4 * HIDDEN * (INPUT + HIDDEN)
