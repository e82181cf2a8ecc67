from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from benchmarks.data import data_folder
from benchmarks.zoo import NETWORKS
from fxquant.backends import backend
from fxquant.backends.exact import value_names
from fxquant.backends.onnx import GraphBuilder, executable, export_onnx, kernel_report, to_onnx
from fxquant.capture import capture
from fxquant.core.errors import FileFormatError, LoweringError, MissingDependencyError, OptionError, OutputError
from fxquant.core.ir import FakeQuantize, Grid, activation_spec, fork
from fxquant.passes import Canonicalize, FoldBatchnorm
from tests.backends.lowered import QUANTIZED, calibrated, error_in_steps, example, plan_of, simulated
from tests.models import MODELS, Composed
from tests.programs import captured, first_answer, folded

needs_data = pytest.mark.skipif(data_folder() is None, reason="set FXQUANT_DATA to run the real networks")

RUN = backend("onnxruntime")
KINDS = (onnx.TensorProto.INT2, onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


def written(module: torch.fx.GraphModule) -> bytes:
    model = to_onnx(module)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_float_graph_answers_like_torch_at_any_batch(name: str) -> None:
    module = folded(name).module
    run = executable(written(module), threads=1)
    for count in (1, 5):
        inputs = example(name, count)
        assert torch.allclose(run(inputs), first_answer(module, inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("widths", [(8,), (4, 8, 2)])
def test_a_quantized_graph_answers_like_the_reference(name: str, widths: tuple[int, ...]) -> None:
    module, inputs = simulated(name, widths), example(name, 6)
    expected = backend("reference").compile(module, inputs)(inputs)
    error = error_in_steps(RUN.compile(module, inputs, threads=1)(inputs), expected)
    assert float(error.max()) <= 2.5
    assert float(error.mean()) < 0.2


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_convolution_and_linear_layer_runs_on_integers(name: str) -> None:
    report = kernel_report(written(simulated(name, (4, 8, 2))))
    # Weights, or a bias, that the graph computes.
    computed = {"functional": {"conv2d_1", "weight"}}.get(name, set())
    assert set(report.float_layers) == computed
    assert set(report.kernels.values()) - {"float"} <= {"QLinearConv", "QGemm", "MatMulIntegerToFloat"}


def test_a_residual_network_has_no_float_between_its_integer_ops() -> None:
    def answer(m: Any, x: Tensor) -> Any:
        x = torch.relu(m.stem(x))
        # Padding on one side only, as networks from TensorFlow have it.
        y = nn.functional.relu6(m.down(nn.functional.pad(x, (0, 1, 0, 1))))
        z = torch.relu(y + m.skip(nn.functional.max_pool2d(x, 2)))
        return m.head(z.mean((2, 3)))

    stem, down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2)
    model = Composed(answer, stem=stem, down=down, skip=nn.Conv2d(8, 8, 1), head=nn.Linear(8, 4))
    module = _quantized(model, torch.randn(8, 3, 8, 8))
    report = kernel_report(written(module))
    assert report.integer_share == 1.0
    assert report.float_products == 0
    # One border on the way in; the classifier writes float by itself.
    assert report.conversions == 1
    assert report.operators["QLinearAdd"] == 1
    assert report.operators["QLinearGlobalAveragePool"] == 1
    assert "Relu" not in report.operators
    assert "Pad" not in {node.op_type for node in to_onnx(module).graph.node}


def _quantized(model: nn.Module, images: Tensor, keep_float: tuple[str, ...] = ()) -> torch.fx.GraphModule:
    return plan_of(calibrated(Canonicalize()(capture(model, (images[:2],))), (images,), keep_float), (8,))


@pytest.mark.parametrize(
    ("name", "widths", "opset", "ir"),
    [
        ("residual", (8,), 18, 8),
        ("residual", (2, 3, 8), 18, 8),
        ("residual", (4, 8), 21, 10),
        ("residual", (5, 8), 21, 10),
        ("sequence", (3,), 20, 9),
    ],
)
def test_the_file_asks_for_no_newer_operator_set_than_it_needs(
    name: str, widths: tuple[int, ...], opset: int, ir: int
) -> None:
    model = to_onnx(simulated(name, widths))
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert model.ir_version == ir
    assert (opset == 20) == ("Gelu" in {node.op_type for node in model.graph.node})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3, 4, 7, 16])
def test_packing_is_what_onnx_reads_back(kind: int, count: int) -> None:
    ranges: dict[int, tuple[int, int]] = dict(zip(KINDS, [(-2, 2), (-8, 8), (0, 16)], strict=True))
    low, high = ranges[kind]
    values, graph = np.random.default_rng(count).integers(low, high, count), GraphBuilder()
    _ = graph.packed(values, kind, (count,), "w")
    assert onnx.numpy_helper.to_array(graph.initializers[0]).astype(np.int8).tolist() == values.tolist()


def test_a_layer_kept_in_float_stays_in_float() -> None:
    torch.manual_seed(0)
    a, b, c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
    model = Composed(lambda m, x: m.c(torch.relu(m.b(torch.relu(m.a(x))))), a=a, b=b, c=c)
    images = torch.randn(8, 4, 8, 8)
    # One wild channel shows a per-tensor int8 weight at once.
    b.weight.data[0] *= 300.0
    module = _quantized(model, images, keep_float=("b",))
    report = kernel_report(written(module))
    assert report.kernels == {"a": "QLinearConv", "b": "float", "c": "QLinearConv"}
    expected = backend("reference").compile(module, (images,))((images,))
    assert float(error_in_steps(RUN.compile(module, (images,))((images,)), expected).max()) <= 1.5


def test_ops_of_no_table_are_written_by_torchs_exporter() -> None:
    def answer(m: Any, x: Tensor) -> Tensor:
        x = torch.cumsum(torch.erf(m.conv(x)), dim=1)
        values, indices = torch.topk(x.flatten(1), 3)
        rows = torch.arange(x.shape[0], dtype=torch.float32).unsqueeze(1)
        return torch.where(values > 0.1, values, rows) + indices.float() * 0.001

    model = Composed(answer, conv=nn.Conv2d(3, 4, 3))
    module = Canonicalize()(capture(model.eval(), (torch.randn(2, 3, 6, 6),))).module
    run = executable(written(module))
    for count in (1, 4):
        x = torch.randn(count, 3, 6, 6)
        assert torch.allclose(run((x,)), module(x), atol=1e-5)


@torch.library.custom_op("fxquant_tests::unknown", mutates_args=())
def unknown(x: Tensor) -> Tensor:
    return x.clone()


@unknown.register_fake
def _unknown_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_answer_of_a_type_without_numpy_form(tmp_path: Path) -> None:
    class Narrow(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).bfloat16()

    module = capture(Narrow(3, 3), (torch.randn(2, 3),)).module
    with pytest.raises(LoweringError, match=r"'output' of the model is bfloat16.*take and return float32"):
        export_onnx(module, tmp_path / "model.onnx")


def test_an_op_without_onnx_form_is_named_with_its_line(tmp_path: Path) -> None:
    class Uses(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = unknown(super().forward(x))
            return answer

    module = capture(Uses(3, 3), (torch.randn(2, 3),)).module
    with pytest.raises(LoweringError, match=r"fxquant_tests.unknown.*unknown\(super\(\).forward\(x\)\)"):
        export_onnx(module, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_the_file_holds_names_metadata_and_nothing_torch_adds(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.onnx"
    report = export_onnx(simulated("residual", (4, 8)), path, {"plan": json.dumps({"bits": [4, 8]})})
    model = onnx.load(path)
    assert report.bytes == path.stat().st_size
    assert report.opset == 21
    assert report.nodes["Conv"] == 3
    assert {entry.key: entry.value for entry in model.metadata_props} == {"plan": '{"bits": [4, 8]}'}
    assert {node.name for node in model.graph.node if node.name} == {"conv1", "conv2", "conv3", "fc"}
    # Layers are called as in the model, integers on quantized edges by their number, all else as shortly as possible.
    made = {name for node in model.graph.node for name in node.output}
    assert {f"q{index}" for index in range(5)} <= made
    others = made - set(value_names(simulated("residual", (4, 8))).values()) - {"output"}
    assert {len(name) for name in others | {t.name for t in model.graph.initializer}} == {1, 2}
    assert [entry.name for entry in model.graph.output] == ["output"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not model.graph.value_info
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_equal_constants_are_stored_once() -> None:
    stored = [(t.data_type, tuple(t.dims), t.raw_data) for t in to_onnx(simulated("shared")).graph.initializer]
    assert len(stored) == len(set(stored))
    assert len([True for kind, shape, _ in stored if kind == onnx.TensorProto.INT8 and len(shape) == 2]) == 1


def test_activations_of_few_bits_are_clipped_to_their_grid() -> None:
    module = fork(simulated("residual"))
    quantizer = module.get_submodule("quantize_x")
    assert isinstance(quantizer, FakeQuantize)
    module.set_submodule(
        "quantize_x", FakeQuantize(Grid(activation_spec(3), torch.tensor(0.4), torch.tensor(4, dtype=torch.int32)))
    )
    inputs = tuple(10 * t for t in example("residual", 4))
    expected = backend("reference").compile(module, inputs)(inputs)
    assert float(error_in_steps(RUN.compile(module, inputs)(inputs), expected).max()) <= 1.5


def test_an_unfolded_batch_norm_is_written_too() -> None:
    module, inputs = captured("residual").module, example("residual", 3)
    assert torch.allclose(RUN.compile(module, inputs)(inputs), first_answer(module, inputs), atol=1e-4)


def test_an_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose a writable folder"):
        export_onnx(simulated("residual"), tmp_path / "file" / "model.onnx")


def test_a_damaged_file_is_a_file_format_error(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x08not a model")
    with pytest.raises(FileFormatError, match=r"bad\.onnx"):
        kernel_report(tmp_path / "bad.onnx")
    with pytest.raises(FileFormatError, match="cannot read"):
        kernel_report(tmp_path / "none.onnx")


def test_threads_below_one_are_refused() -> None:
    with pytest.raises(OptionError, match="threads=0"):
        RUN.compile(simulated("residual"), example("residual", 2), threads=0)


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named 'onnxruntime' ({name})", name="onnxruntime")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingDependencyError, match=r'pip install "fxquant\[onnx\]"'):
        RUN.compile(simulated("residual"), example("residual", 2))


@needs_data
def test_a_real_network_runs_on_integers_alone() -> None:
    network = NETWORKS["resnet20"]
    images = network.calibration(12)
    program = FoldBatchnorm()(Canonicalize()(capture(network.factory(), (images[:2],))))
    program = calibrated(program, (images[:8],), widths=(4, 8))
    float_bytes = len(written(program.module))
    for widths in ((8,), (4,)):
        module = plan_of(program, widths)
        model = written(module)
        report = kernel_report(model)
        assert len(report.kernels) == 20
        assert report.integer_share == 1.0
        assert report.float_products == 0
        assert report.conversions <= 2
        expected = backend("reference").compile(module, (images,))((images,))
        error = error_in_steps(executable(model)((images,)), expected)
        assert float(error.mean()) < 0.5
        assert float(error.max()) < 4.0
    assert len(model) <= 0.16 * float_bytes


def test_equal_content_of_two_types_is_stored_twice() -> None:
    graph, values = GraphBuilder(), np.zeros((2, 4), np.int8)
    kinds = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.INT4)
    assert len({graph.packed(values, kind, (2, 4), "weight") for kind in kinds} | {graph.constant(values, "w")}) == 3
    assert [tensor.data_type for tensor in graph.initializers] == [*kinds[:2], onnx.TensorProto.INT8]


def test_zero_points_and_scales_of_biases_are_made_at_load() -> None:
    """A bias has the scale `input scale x weight scale`, to the last bit, and zeros take no bytes of their own."""
    wide = Composed(
        lambda m, x: m.head(torch.relu(m.conv(x)).mean((2, 3))), conv=nn.Conv2d(3, 200, 3), head=nn.Linear(200, 9)
    )
    graph = to_onnx(_quantized(wide, torch.randn(8, 3, 8, 8))).graph
    operators = Counter(node.op_type for node in graph.node)
    assert (operators["Mul"], operators["Expand"]) == (2, 1)
    floats = sum(np.prod(t.dims, dtype=int) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    assert floats < 200 + 9 + 10
