"""The contract of every backend, those of BACKENDS and the one that the page on backends adds."""

from __future__ import annotations

import configparser
import importlib.util
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from benchmarks.data import data_folder
from benchmarks.zoo import NETWORKS
from fxquant.backends import BACKENDS, Backend, Export, Packages, backend, backends, lower, runtimes
from fxquant.capture import capture
from fxquant.core.errors import LoweringError, MissingDependencyError, OptionError
from fxquant.core.facts import Target
from fxquant.core.run import CalibrationSet, model_outputs
from fxquant.outputs import layouts
from fxquant.parity import compare
from fxquant.passes import Canonicalize, FoldBatchnorm
from tests.backends.lowered import QUANTIZED, calibrated, error_in_steps, example, plan_of, simulated
from tests.backends.page import run_page
from tests.programs import first_answer, folded

ADDED = "mine"
ALL = [*BACKENDS, ADDED]
LAYERED = "residual"


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    _ = run_page(monkeypatch, everything=False)


def close(answer: Tensor, expected: Tensor) -> bool:
    error = error_in_steps(answer, expected)
    return float(error.max()) <= 2.5 and float(error.mean()) < 0.2


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("network", QUANTIZED)
def test_answers_are_the_simulations_to_a_step(name: str, network: str) -> None:
    target = backend(name).target
    widths = tuple(bits for bits in (4, 8, 2) if bits in target.weight_bits)
    module, inputs = simulated(network, widths), example(network, 6)
    assert close(backend(name).compile(module, inputs, threads=1)(inputs), first_answer(module, inputs))


@pytest.mark.parametrize("name", ALL)
def test_every_width_of_the_target_and_float_run(name: str) -> None:
    found, inputs = backend(name), example(LAYERED, 6)
    for bits in found.target.weight_bits:
        module = simulated(LAYERED, (bits,))
        assert close(found.compile(module, inputs)(inputs), first_answer(module, inputs)), bits
    float_model = folded(LAYERED).module
    answer = found.compile(float_model, inputs)(inputs)
    torch.testing.assert_close(answer, first_answer(float_model, inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in ALL if name == ADDED or backend(name).lower is not None])
@pytest.mark.parametrize("network", QUANTIZED)
def test_a_lowered_graph_is_called_as_the_model_and_answers_alike(name: str, network: str) -> None:
    module, inputs = simulated(network, (8, 4)), example(network, 4)
    before = str(module.graph)
    lowered = lower(name, module)
    with torch.no_grad():
        answer, expected = lowered(*inputs), module(*inputs)
    assert tree_flatten(answer)[1] == tree_flatten(expected)[1]
    for mine, theirs in zip(tree_flatten(answer)[0], tree_flatten(expected)[0], strict=True):
        assert not isinstance(theirs, Tensor) or (mine.shape == theirs.shape and close(mine.float(), theirs))
    assert str(module.graph) == before


@pytest.mark.parametrize("name", ALL)
def test_files_and_kernels_belong_together(name: str, tmp_path: Path) -> None:
    found, module = backend(name), simulated(LAYERED)
    kernels = {} if found.kernels is None else found.kernels(module, None)
    if found.export is not None:
        path = tmp_path / found.export.file
        texts = {"fxquant_plan": "{}"}
        assert found.export.write(module, path, texts) == path.stat().st_size > 0
        assert found.kernels is None or found.kernels(module, path) == kernels
        assert found.file_bytes is None or found.file_bytes(module, texts) == path.stat().st_size
    if found.kernels is not None:
        layers = {site for site in folded(LAYERED).module.state_dict() if site.endswith(".weight")}
        assert set(kernels) <= {site.removesuffix(".weight") for site in layers}
        assert sum(not kernel.startswith("float") for kernel in kernels.values()) >= 3


@pytest.mark.parametrize("name", ALL)
def test_each_runtime_rounds_by_its_formulas(name: str) -> None:
    # Inductor takes long to compile; tests/parity/test_edge_check.py has "compiled".
    for runtime in list(backend(name).runtimes)[:1]:
        found = compare(simulated(LAYERED, (8, 4)), CalibrationSet(example(LAYERED, 6)), (runtime,))
        assert found.within, found.summary()
        assert all(pair.edges > 2 for pair in found.pairs)


def test_names_are_one_backends_each() -> None:
    found = backends()
    assert [each.target.name for each in found.values()] == list(found) == ALL
    assert all(each.target.runner == name for name, each in found.items())
    several = Counter(name for each in found.values() for name in each.runtimes)
    several += Counter(layout for each in found.values() if each.export for layout in each.export.layouts)
    several -= Counter(["onnxruntime"])  # a runtime and the layout of its file
    assert set(several.values()) == {1}
    assert set(runtimes()) == {name for each in found.values() for name in each.runtimes}
    assert set(layouts()) == {"onnxruntime", "openvino", ADDED}
    assert [each.name for each in fields(Backend)][:2] == ["target", "compile"]


def test_missing_packages_are_named_with_what_installs_them() -> None:
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    for name, found in backends().items():
        found.check_packages()
        assert all(importlib.util.find_spec(module) is not None for module in found.packages.modules), name
        if found.packages.install.startswith("fxquant["):
            assert found.packages.install.removeprefix("fxquant[").rstrip("]") in config["options.extras_require"]
    lacking = replace(backend(ADDED), packages=Packages(("no_such_runtime",), "my-runtime"))
    with pytest.raises(MissingDependencyError, match=r'the mine target needs no_such_runtime.* install "my-runtime"'):
        lacking.check_packages()


def test_what_a_backend_lacks_is_said_with_the_targets_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = simulated(LAYERED)
    monkeypatch.setattr("my_backend.mine", lambda: replace(backend("reference"), lower=None))
    with pytest.raises(LoweringError, match=r"cannot be lowered to a graph; targets that can: reference, .*onnxrun"):
        lower(ADDED, module)
    with pytest.raises(OptionError, match=r"exports a file 'net.bin'; call it model.SUFFIX"):
        Export("net.bin", lambda *_: 0)


def test_a_proxy_runs_a_target_but_lends_neither_its_file_nor_its_kernels() -> None:
    own = backend("onnxruntime")
    proxy = backend(replace(own.target, name="npu", runs_on="onnxruntime"))
    assert (proxy.target.name, proxy.target.runner) == ("npu", "onnxruntime")
    assert (proxy.compile, proxy.export, proxy.file_bytes, proxy.kernels) == (own.compile, None, None, None)
    narrower = replace(own.target, weight_bits=(8,))
    assert backend(narrower).target is narrower
    assert backend(narrower).export == own.export
    with pytest.raises(OptionError, match=r"target 'npu': runs_on=None is unknown; known: reference"):
        backend(Target("npu", {}, frozenset(), (8,), (8,), {8: 8}))


@pytest.mark.slow
@pytest.mark.skipif(data_folder() is None, reason="set FXQUANT_DATA to run the real networks")
def test_resnet20_predicts_the_same_classes_in_every_runtime() -> None:
    network = NETWORKS["resnet20"]
    images, _ = network.evaluation(400)
    cases = network.calibration(32)
    canonical = FoldBatchnorm()(Canonicalize()(capture(network.factory(), (cases[:2],))))
    program = calibrated(canonical, (cases,), widths=(4, 8))
    module = plan_of(program, (8, 4))
    expected = model_outputs(module, (images,))
    for runtime in BACKENDS:
        run = backend(runtime).compile(module, (cases[:2],))
        answer = torch.cat([run((images[k : k + 64],)) for k in range(0, len(images), 64)])
        agreement = (answer.argmax(dim=1) == expected.argmax(dim=1)).double().mean()
        assert float(agreement) > 0.995, runtime
        assert float(error_in_steps(answer, expected).mean()) < 0.2, runtime
