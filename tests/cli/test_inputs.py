from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fxquant.cli import ImageOptions, load_calibration, load_model, read_image
from fxquant.core.errors import CalibrationError, FileFormatError, FxquantError, MissingDependencyError, OptionError
from fxquant.core.run import collect

SIZE = ImageOptions(size=(4, 6))


def batches(spec: object, options: ImageOptions = SIZE, limit: int = 8) -> list[Tensor]:
    """Return the images of a spec as the pipeline would collect them."""
    return list(collect(load_calibration(str(spec), options, limit), ["x"]).inputs[0])


def image(path: Path, colour: tuple[int, int, int], width: int = 12, height: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)
    return path


def test_model_from_factory_class_instance_and_nested_name() -> None:
    assert isinstance(load_model("tests.small:small"), nn.Module)
    assert isinstance(load_model("tests.small:SmallNet"), nn.Module)
    assert isinstance(load_model("torch:nn.Identity"), nn.Identity)


def test_model_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_net.py").write_text("import torch\nnet = torch.nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert isinstance(load_model("my_own_net:net"), nn.Linear)


def test_model_from_a_file_with_what_is_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_it.py").write_text("WIDTH = 3\n")
    # A name that another module has already.
    (tmp_path / "json.py").write_text(
        "import torch\nfrom beside_it import WIDTH\n\ndef make():\n    return torch.nn.Linear(2, WIDTH)\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = load_model(f"{tmp_path}/json.py:make")
    assert isinstance(model, nn.Linear)
    assert model.out_features == 3
    with pytest.raises(OptionError, match=r"no file .*absent\.py"):
        load_model(f"{tmp_path}/absent.py:make")


@pytest.mark.parametrize("name", ["net.pth", "net.pt", "net.safetensors"])
def test_weights_are_no_model(name: str) -> None:
    with pytest.raises(OptionError, match=rf"any program.*load_state_dict.*{name}.*net\.py:function.*\.pt2"):
        load_model(f"folder/{name}")


@pytest.mark.parametrize("spec", ["tests.small", ":small", "tests.small:", "tests.small:images", "json:loads"])
def test_no_model(spec: str) -> None:
    with pytest.raises(OptionError, match=r"--model|calling"):
        load_model(spec)


def test_pt2_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(b"not a zip")
    with pytest.raises(FileFormatError, match=r"net\.pt2 is not an intact exported program"):
        load_model(str(tmp_path / "net.pt2"))


def test_npy_and_npz(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.float64).reshape(6, 4)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "any.npz", images=x)
    np.savez(tmp_path / "both.npz", images=x, labels=np.arange(6))
    np.savez(tmp_path / "named.npz", right=x, left=-x)
    found = collect(load_calibration(str(tmp_path / "x.npy"), SIZE, 8), ["x"])
    assert found.inputs[0].dtype == torch.float32
    assert torch.equal(found.inputs[0], torch.from_numpy(x).float())
    assert len(batches(tmp_path / "any.npz")) == 6
    with_labels = collect(load_calibration(str(tmp_path / "both.npz"), SIZE, 8), ["x"])
    assert with_labels.labels is not None
    assert with_labels.labels.tolist() == list(range(6))
    named = collect(load_calibration(str(tmp_path / "named.npz"), SIZE, 8), ["left", "right"])
    assert torch.equal(named.inputs[0], -named.inputs[1])


def test_arrays_that_are_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "labels.npz", y=np.arange(3))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", x=np.zeros(3))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    for name, message in {
        "labels.npz": "no arrays but labels",
        "objects.npy": "objects.npy is not a readable npy",
        "archive.npy": "call it .npz",
        "cut.npz": "cut.npz",
    }.items():
        with pytest.raises(FxquantError, match=message):
            load_calibration(str(tmp_path / name), SIZE, 8)


def test_folder_is_read_in_sorted_order_and_sampled_evenly(tmp_path: Path) -> None:
    for k in range(10):
        image(tmp_path / f"class{k // 5}" / f"{k}.png", (k * 20, 0, 0))
    (tmp_path / "readme.txt").write_text("no image")
    reds = [round(float(x[0, 0, 0]) * 255) for x in batches(tmp_path, limit=5)]
    assert reds == [0, 40, 80, 120, 160]
    assert len(batches(tmp_path, limit=100)) == 10


def test_image_is_scaled_cut_and_normalised(tmp_path: Path) -> None:
    wide = Image.new("RGB", (30, 10), (255, 0, 0))
    wide.paste((0, 255, 0), (10, 0, 20, 10))
    wide.save(tmp_path / "wide.png")
    options = ImageOptions((8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    x = read_image(tmp_path / "wide.png", options, (8, 8))
    assert x.shape == (3, 8, 8)
    assert x.dtype == torch.float32
    # The middle third is what is left, and it is green.
    assert x[:, 4, 4].tolist() == [-1.0, 2.0, -1.0]
    grey = read_image(tmp_path / "wide.png", ImageOptions((5, 7), (0.0,), (1.0,)), (5, 7))
    assert grey.shape == (1, 5, 7)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    image(tmp_path / "a.png", (1, 2, 3))
    whole = image(tmp_path / "b.jpg", (1, 2, 3), 64, 64).read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CalibrationError, match=r"b\.jpg cannot be read"):
        batches(tmp_path)
    (tmp_path / "b.jpg").write_text("hello")
    with pytest.raises(CalibrationError, match=r"b\.jpg cannot be read"):
        batches(tmp_path)


def test_folders_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no images"):
        batches(tmp_path)
    image(tmp_path / "a.png", (1, 2, 3))
    with pytest.raises(OptionError, match="--image-size"):
        batches(tmp_path, ImageOptions())


def test_missing_pillow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "a.png", (1, 2, 3))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "fxquant\[vision\]"'):
        batches(tmp_path)


@pytest.mark.parametrize(
    ("size", "mean", "std"),
    [((0, 4), (0.0,), (1.0,)), ((4, 4), (0.0, 0.0), (1.0, 1.0)), (None, (0.0,), (0.0,)), (None, (np.nan,), (1.0,))],
)
def test_options_out_of_range(size: tuple[int, int] | None, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(OptionError, match=r"must be|need one number each"):
        ImageOptions(size, mean, std)


LOADED = [torch.ones(2, 3), torch.zeros(2, 3)]


def own_error() -> Iterator[Tensor]:
    """Raise an error of fxquant's own."""
    yield torch.ones(1, 3)
    raise CalibrationError("mine")


def test_loaders() -> None:
    assert len(batches("tests.cli.test_inputs:LOADED")) == 4
    assert len(batches("tests.small:images")) == 24
    with pytest.raises(
        CalibrationError, match=r"from tests\.small:failing_loader failed: RuntimeError: disk went away"
    ):
        batches("tests.small:failing_loader")
    with pytest.raises(CalibrationError, match="mine"):
        batches("tests.cli.test_inputs:own_error")
