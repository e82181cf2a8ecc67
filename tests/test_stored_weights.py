"""Weights that float ops read, stored in a format all the same: tables, recurrent layers, 3-d convolution."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.backends.onnx import executable, inspect_onnx, to_onnx
from fxquant.core.errors import OptionError
from fxquant.core.facts import CostTables
from fxquant.core.ir import Choice, Sites
from fxquant.result import Result
from tests.models import Composed

TOKENS = torch.randint(0, 40, (24, 6), generator=torch.Generator().manual_seed(0))
VOLUMES = torch.randn(24, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


def table(tied: bool = False) -> nn.Module:
    layers = {"table": nn.Embedding(40, 16), "mix": nn.Linear(16, 16), "head": nn.Linear(16, 40 if tied else 5)}
    if tied:
        layers["head"].weight = layers["table"].weight
    return Composed(lambda net, x: net.head(torch.relu(net.mix(net.table(x))).mean(dim=1)), **layers)


def recurrent(kind: Callable[..., nn.RNNBase], state: bool = False, **settings: Any) -> nn.Module:
    layer = kind(8, 6, batch_first=True, **settings)
    ways = 2 if layer.bidirectional else 1

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.table(x)
        start = (y.mean(dim=1)[:, :6].expand(ways * layer.num_layers, -1, -1).contiguous(),) if state else ()
        given = () if not state else (start * 2,) if kind is nn.LSTM else start
        made, last = net.layer(y, *given)
        ends = last[0] if kind is nn.LSTM else last
        answer: Tensor = net.head(made[:, -1] + made.mean(dim=1)) + ends.mean(dim=(0, 2)).unsqueeze(1)
        return answer

    return Composed(forward, table=nn.Embedding(40, 8), layer=layer, head=nn.Linear(6 * ways, 3))


def volumes() -> nn.Module:
    down, up = nn.Conv3d(2, 6, 3, padding=1, groups=2), nn.ConvTranspose3d(6, 4, 2, 2, groups=2)
    layers = {"down": down, "up": up, "head": nn.Linear(4, 5)}
    return Composed(lambda net, x: net.head(net.up(torch.relu(net.down(x))).mean(dim=(2, 3, 4))), **layers)


def products() -> nn.Module:
    return Composed(
        lambda net, x: torch.einsum("bi,oi->ob", torch.relu(net.stem(x)), net.matrix).t(),
        stem=nn.Linear(6, 4),
        matrix=nn.Parameter(torch.randn(3, 4)),
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, set[str]]] = {
    "table": (table, TOKENS, {"table"}),
    "lstm": (partial(recurrent, nn.LSTM, num_layers=2), TOKENS, {"table", "layer.weight_hh_l1"}),
    "lstm with a state": (
        partial(recurrent, nn.LSTM, state=True, bidirectional=True),
        TOKENS,
        {"table", "layer.weight_hh_l0_reverse"},
    ),
    "gru": (partial(recurrent, nn.GRU, state=True, bias=False), TOKENS, {"table", "layer.weight_ih_l0"}),
    "rnn": (partial(recurrent, nn.RNN, nonlinearity="relu", bidirectional=True), TOKENS, {"table"}),
    "volumes": (volumes, VOLUMES, {"down", "up"}),
    "products": (products, VECTORS, {"matrix"}),
}
"""Name -> model, its inputs, and sites that are stored."""


def quantized(model: nn.Module, inputs: Tensor, **settings: Any) -> Result:
    given = {"bits": (4, 8), "effort": "fast", "target": "onnxruntime", "budget": {"average_bits": 6}, **settings}
    return fxquant.quantize(model, inputs, **given, progress=False)


@cache
def result_of(name: str) -> tuple[Result, nn.Module]:
    torch.manual_seed(len(name))
    make, inputs, _ = CASES[name]
    model = make().eval()
    return quantized(model, inputs), model


@pytest.mark.parametrize("name", list(CASES))
def test_stored_weights_are_sites_and_both_runtimes_agree(name: str, tmp_path: Path) -> None:
    result, model = result_of(name)
    _, inputs, stored = CASES[name]
    sites = result.program[Sites]
    assert stored <= {site.name for site in sites.sites if site.stored}
    assert not sites.refusals
    assert all(result.allocation.choices[site.name].weights_only == site.stored for site in sites.sites)
    parity = fxquant.check(result, inputs)
    assert all(pair.within and pair.max_step < 0.01 for pair in parity.pairs), parity
    with torch.no_grad():
        wanted, simulated = model(inputs), result.simulated(inputs)
        assert torch.allclose(fxquant.lower(result, "fx_int8")(inputs), simulated, atol=1e-5)
        assert 10 * torch.log10(wanted.square().mean() / (simulated - wanted).square().mean()) > 20
        result.save(tmp_path / "kept")
        assert torch.equal(fxquant.load(tmp_path / "kept").simulated(inputs), simulated)


def test_files_and_state_dicts_hold_the_integers(tmp_path: Path) -> None:
    model = Composed(
        lambda net, x: net.head(net.table(x).mean(dim=1)), table=nn.Embedding(40, 512), head=nn.Linear(512, 8)
    )
    sizes = {}
    for bits in (4, 8):
        result = quantized(model.eval(), TOKENS, bits=(bits,), budget=None)
        sizes[bits] = result.to_onnx(tmp_path / f"{bits}.onnx").bytes
        state = fxquant.lower(result, "fx_int8").state_dict()
        assert state["integer.embedding.packed"].numel() == 40 * 512 * bits / 8
        assert "table.weight" not in state
        # Size counts what the file holds, scales included.
        assert result.costs["size"].of(result.allocation.choices) == pytest.approx(sizes[bits], rel=0.2)
        assert result.costs["average_bits"].of(result.allocation.choices) == bits
    assert sizes[8] - sizes[4] == pytest.approx((40 + 8) * 512 / 2, rel=0.02)
    # Rows are looked up as integers.
    nodes = {node.output[0]: node for node in onnx.load(tmp_path / "8.onnx").graph.node}
    gathers = [node for node in nodes.values() if node.op_type == "Gather"]
    tensors = {t.name: t for t in onnx.load(tmp_path / "8.onnx").graph.initializer}
    assert any(g.input[0] in tensors and tensors[g.input[0]].data_type == onnx.TensorProto.INT8 for g in gathers)


def test_lowered_graphs_can_be_copied_saved_and_exported() -> None:
    for name in ("lstm", "table", "volumes"):
        inputs = CASES[name][1]
        lowered = fxquant.lower(result_of(name)[0], "fx_int8")
        with torch.no_grad():
            wanted = lowered(inputs)
            assert torch.equal(copy.deepcopy(lowered)(inputs), wanted)
            buffer = io.BytesIO()
            torch.export.save(torch.export.export(lowered, (inputs,)), buffer)
            buffer.seek(0)
            assert torch.equal(torch.export.load(buffer).module()(inputs), wanted)


def test_a_table_tied_to_the_classifier_is_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = quantized(table(tied=True).eval(), TOKENS, bits=(4,), budget=None)
    assert {site.name: site.followers for site in result.program[Sites].sites} == {"mix": (), "head": ("embedding",)}
    assert not result.program[Sites].refusals
    result.to_onnx(tmp_path / "net.onnx")
    kept = [t for t in onnx.load(tmp_path / "net.onnx").graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert sum(prod(t.dims) for t in kept) == 40 * 16 + 16 * 16
    assert all(pair.within for pair in fxquant.check(result, TOKENS).pairs)


@pytest.mark.parametrize("tie", ["parameter", "path"])
def test_a_float_table_tied_to_the_classifier_is_written_once(tie: str) -> None:
    torch.manual_seed(0)
    layers = {"table": nn.Embedding(40, 16), "mix": nn.Linear(16, 16), "head": nn.Linear(16, 40)}

    def forward(net: Any, x: Tensor) -> Tensor:
        made = torch.relu(net.mix(net.table(x)))
        logits: Tensor = net.head(made) if tie == "parameter" else F.linear(made, net.table.weight, net.head.bias)
        return logits

    if tie == "parameter":
        layers["head"].weight = layers["table"].weight
    model = Composed(forward, **layers).eval()
    file = to_onnx(fxquant.capture(model, TOKENS).module)
    floats = sum(prod(t.dims) for t in file.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    assert floats == 40 * 16 + 16 * 16 + 16 + 40
    with torch.no_grad():
        torch.testing.assert_close(executable(file.SerializeToString())((TOKENS,)), model(TOKENS), atol=1e-5, rtol=1e-5)


def test_pins_patterns_and_plans_name_stored_weights() -> None:
    model = table().eval()
    result = quantized(model, TOKENS, options={"pins": {"table": "W8A8"}}, budget={"average_bits": 7})
    assert result.allocation.choices["table"].label == "W8"
    kept = quantized(model, TOKENS, options={"keep_float": ("table",)}, budget=None)
    assert [site.name for site in kept.program[Sites].sites] == ["mix", "head"]
    assert list(kept.program[Sites].refusals) == ["embedding"]
    free = quantized(model, TOKENS)
    edited = free.with_plan(fxquant.BitAllocation({"table": Choice(4, 8), "mix": Choice(4, 8), "head": Choice(8, 8)}))
    assert edited.allocation.choices["table"] == Choice.parse("W4")
    assert torch.isfinite(edited.simulated(TOKENS)).all()
    with pytest.raises(OptionError, match="'mix' runs on integers"):
        quantized(model, TOKENS, options={"pins": {"mix": "W4"}})


@pytest.mark.parametrize(
    "estimator", ["diagonal", "gram", "fisher", "hawq", "fit", "mpqco", "sqnr", "weight_mse", "path"]
)
def test_every_estimator_scores_them(estimator: str) -> None:
    options = {"estimators": (estimator,)}
    result = quantized(recurrent(nn.LSTM).eval(), TOKENS[:8], options=options)
    matrix = result.sensitivity
    at = {c: float(matrix.values[k, k]) for k, c in enumerate(matrix.candidates)}
    losses = {c.choice.label: loss for c, loss in at.items() if c.site == "layer.weight_ih_l0"}
    assert losses["W4"] > losses["W8"] > -1e-6
    assert "average_bits" in result.program[CostTables].tables


def test_several_activation_widths() -> None:
    result = quantized(table().eval(), TOKENS, activation_bits=(4, 8), target="fx_int8")
    assert {c.choice.label for c in result.program[Sites].by_name("table").candidates} == {"W4", "W8"}
    assert torch.isfinite(result.simulated(TOKENS)).all()


def test_files_say_what_is_stored(tmp_path: Path) -> None:
    result, _ = result_of("volumes")
    result.to_onnx(tmp_path / "net.onnx")
    found = {layer.operator: layer for layer in inspect_onnx(tmp_path / "net.onnx").layers}
    width = result.allocation.choices["down"].weight_bits
    assert (found["Conv"].weight, found["Conv"].activation) == (f"INT{width:g}", None)
    assert "not quantized" in (found["Conv"].reason or "")


def test_float_ops_between_integer_layers_keep_float_inputs() -> None:
    """ONNX Runtime must not quantize a float layer between two integer ones by itself."""
    torch.manual_seed(0)
    layers = {"one": nn.Conv2d(2, 4, 3, padding=1), "up": nn.ConvTranspose2d(4, 4, 3, 2, dilation=2)}
    layers["two"] = nn.Conv2d(4, 4, 3)
    model = Composed(lambda net, x: net.two(torch.relu(net.up(torch.relu(net.one(x))))).mean(dim=(2, 3)), **layers)
    images = torch.randn(16, 2, 8, 8)
    result = quantized(model.eval(), images, budget=None)
    assert result.program[Sites].by_name("up").kind == "conv_transpose"
    assert all(pair.within and pair.max_step < 0.01 for pair in fxquant.check(result, images).pairs)
    assert F.mse_loss(result.simulated(images), model(images)) < 1e-3
