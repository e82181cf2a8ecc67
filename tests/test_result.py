from __future__ import annotations

import json
import shutil
import stat
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxquant
from fxquant import Budget, Choice, FxquantError, Result
from fxquant.core.errors import FileFormatError, OutputError
from fxquant.core.facts import EFFORTS, Surrogates
from fxquant.core.ir import Sites
from fxquant.core.run import model_outputs
from tests.models import MODELS, built
from tests.scoring import inputs, plain_net

IMAGES = inputs("plain", 24)[0]
BUDGET = Budget(average_bits=4.5)
FILES = sorted(
    [
        "held_out.safetensors",
        "model.pt2",
        "plan.json",
        "ranges.npz",
        "result.json",
        "rounded_weights.npz",
        "rounding.npz",
        "scoring.safetensors",
        *sorted(f"sensitivity_{name}.npz" for name in EFFORTS["default"].estimators),
    ]
)


@cache
def quantized() -> Result:
    return fxquant.quantize(
        plain_net(),
        IMAGES,
        BUDGET,
        target="reference",
        options={"pins": {"conv2": "W4A8"}, "forbid": {"conv1": "W2A8"}},
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized().save(tmp_path_factory.mktemp("saved") / "deep" / "result")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved result to do harm to."""
    return Path(shutil.copytree(saved, tmp_path / "result"))


def answers(result: Result) -> torch.Tensor:
    return model_outputs(result.simulated, (IMAGES,))


def test_a_saved_result_reads_back_whole(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == FILES
    known, found = quantized(), fxquant.load(saved)
    assert found.allocation.to_json() == known.allocation.to_json()
    assert torch.equal(answers(found), answers(known))
    for name, matrix in known.program[Surrogates].matrices.items():
        again = found.program[Surrogates].matrices[name]
        assert np.array_equal(again.values, matrix.values)
        assert np.array_equal(again.stderr, matrix.stderr)
    assert found.program[Sites] == known.program[Sites]
    assert {name: t.to_json() for name, t in found.costs.tables.items()} == {
        name: t.to_json() for name, t in known.costs.tables.items()
    }
    assert {name: plan.to_json() for name, plan in found.finalists.items()} == {
        name: plan.to_json() for name, plan in known.finalists.items()
    }
    assert found.held_out is not None
    assert known.held_out is not None
    assert torch.equal(found.held_out.inputs[0], known.held_out.inputs[0])


def test_saved_and_loaded_once_more(saved: Path, tmp_path: Path) -> None:
    again = fxquant.load(fxquant.load(saved).save(tmp_path))
    assert again.allocation.to_json() == quantized().allocation.to_json()
    assert torch.equal(answers(again), answers(quantized()))


def test_every_file_has_the_mode_of_any_new_file(saved: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
    assert set(modes.values()) == {stat.S_IMODE(plain.stat().st_mode)}, modes


@pytest.mark.slow
def test_another_budget_from_the_saved_scores(saved: Path) -> None:
    budget = Budget(average_bits=6, size_ratio=0.5, bops_ratio=0.04)
    fresh, read = (fxquant.resolve(source, budget) for source in (quantized(), saved))
    assert fresh.allocation.to_json() == read.allocation.to_json()
    assert torch.equal(answers(fresh), answers(read))
    assert read.allocation.choices["conv2"] == Choice(4, 8)
    plans = fxquant.pareto(saved, [Budget(average_bits=4), Budget(average_bits=7)])
    assert [plan.limits["average_bits"] for plan in plans] == [4, 7]


def test_labels_of_held_out_images_are_kept(tmp_path: Path) -> None:
    labels = torch.arange(24) % 4
    result = fxquant.quantize(
        plain_net(), [(IMAGES, labels)], BUDGET, target="reference", effort="fast", bits=(4, 8), options={"loss": "ce"}
    )
    found = fxquant.resolve(result.save(tmp_path), Budget(average_bits=8)).allocation
    assert found.to_json() == fxquant.resolve(result, Budget(average_bits=8)).allocation.to_json()


@pytest.mark.parametrize("name", ["shared", "two_inputs", "tokens"])
def test_other_networks(name: str, tmp_path: Path) -> None:
    batches = [MODELS[name].inputs(8)]
    result = fxquant.quantize(built(name), batches, Budget(average_bits=6), target="reference", effort="fast")
    found = fxquant.load(result.save(tmp_path))
    one, other = (model_outputs(each.simulated, batches[0]) for each in (result, found))
    assert torch.equal(one, other)
    assert found.allocation.to_json() == result.allocation.to_json()


def refused(folder: Path, name: str, *contents: bytes | None) -> None:
    """Check that a folder whose file of this name is missing (None), or holds this, is refused by that name."""
    path = folder / name
    whole = path.read_bytes()
    for data in contents:
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(FileFormatError, match=name):
            fxquant.load(folder)
    path.write_bytes(whole)


def test_a_damaged_file_is_named(folder: Path) -> None:
    # The cut one is the only array file that the tests of the command line leave whole.
    for name in FILES:
        refused(folder, name, None, *([b"PK"] if name == "rounding.npz" else []))
    assert fxquant.load(folder).allocation == quantized().allocation


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, None) for key in ("settings", "costs", "estimators", "finalists", "plan", "held_out", "graph")),
        ("settings", {"bits": "all"}),
        ("settings", 3),
        ("costs", {"size": {"values": [1.0]}}),
        ("estimators", []),
        ("estimators", ["pairs"]),
        ("finalists", {"gram": 3}),
        ("graph", "0123456789abcdef"),
    ],
)
def test_a_header_that_lacks_a_field_or_was_tampered_with(folder: Path, key: str, value: object) -> None:
    document = json.loads((folder / "result.json").read_text())
    changed = {name: known for name, known in {**document, key: value}.items() if known is not None}
    (folder / "result.json").write_text(json.dumps(changed))
    with pytest.raises(FileFormatError):
        fxquant.load(folder)


def test_files_of_another_result(folder: Path, tmp_path: Path) -> None:
    cheap: dict[str, Any] = {"target": "reference", "effort": "fast", "options": {"estimators": ("gram",)}}
    images = MODELS["tokens"].inputs(8)[0]
    other = fxquant.quantize(built("tokens"), images, Budget(average_bits=6), **cheap).save(tmp_path / "other")
    for name in ("model.pt2", "sensitivity_gram.npz", "plan.json"):
        mixed = Path(shutil.copytree(folder, tmp_path / f"mixed_{name}"))
        shutil.copy(other / name, mixed / name)
        with pytest.raises(FxquantError) as error:
            fxquant.load(mixed)
        assert error.value.exit_code == 2


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileFormatError):
            fxquant.load(path)
    with pytest.raises(FileFormatError):
        fxquant.resolve(tmp_path / "nowhere", BUDGET)


def test_a_plan_edited_in_the_folder(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    plan["choices"]["fc"] = "W2cA8"
    (folder / "plan.json").write_text(json.dumps(plan))
    found = fxquant.load(folder)
    assert found.allocation.choices["fc"] == Choice.parse("W2cA8")
    assert found.allocation.status == "manual"
    assert found.allocation.measured_loss is None
    assert not torch.equal(answers(found), answers(quantized()))


def test_nothing_of_an_earlier_result_stays(folder: Path) -> None:
    bare = Result(quantized().program)
    assert "held_out.safetensors" not in {path.name for path in bare.save(folder).iterdir()}
    assert fxquant.load(folder).held_out is None


def test_a_save_that_fails_leaves_the_earlier_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        Result(quantized().program).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose a writable folder"):
        quantized().save(tmp_path / "file")
    with pytest.raises(OutputError, match="choose a writable folder"):
        quantized().save(tmp_path / "file" / "below")


def test_the_example_has_the_shapes_of_the_model() -> None:
    assert [tuple(t.shape) for t in quantized().example] == [(2, 3, 6, 6)]
    bare = Result(quantized().program).example
    assert [tuple(t.shape) for t in bare] == [(2, 3, 6, 6)]
    assert quantized().simulated(*bare).shape == (2, 4)


def test_views_of_one_result_agree() -> None:
    result = quantized()
    assert result.simulated is result.simulated
    assert result.sensitivity is result.program[Surrogates].matrices["gram_shrunk"]
    measured = result.allocation.finalists
    # What swaps made of a finalist is no finalist.
    assert set(measured) - {"refined"} == set(result.finalists)
    best = min(measured, key=measured.__getitem__)
    assert best == "refined" or result.allocation.choices == result.finalists[best].choices
    plan = result.allocation
    # The rounding of so small a network may be rejected, and then nothing was measured again.
    compared = plan.measured_loss if plan.compared_loss is None else plan.compared_loss
    assert compared == pytest.approx(min(measured.values()), rel=1e-4)
    assert set(result.costs.tables) == {"size", "bops", "average_bits", "activation"}


@pytest.fixture(scope="module")
def saved_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = quantized().trainable()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.05)
    return quantized().with_trained(module).save(tmp_path_factory.mktemp("trained"))


def test_a_damaged_file_of_a_trained_result_is_named(saved_trained: Path, tmp_path: Path) -> None:
    assert not torch.equal(answers(fxquant.load(saved_trained)), answers(quantized()))
    refused(Path(shutil.copytree(saved_trained, tmp_path / "result")), "trained.npz", None, b"PK")


def test_nothing_of_a_trained_result_stays(saved_trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_trained, tmp_path / "result"))
    assert sorted(path.name for path in quantized().save(folder).iterdir()) == FILES
    assert torch.equal(answers(fxquant.load(folder)), answers(quantized()))
