"""Files that mean harm: nothing in them is run, written elsewhere or believed, and each ends in one error of ours."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fxquant.cli import ImageOptions, inspect, load_calibration, load_model, main
from fxquant.core.errors import FileFormatError, FxquantError
from fxquant.core.facts import BitAllocation, Ranges, Rounding, SensitivityMatrix, read_target
from fxquant.core.run import collect
from fxquant.core.storage import read_arrays, read_json, read_tensors
from fxquant.outputs import write_outputs
from fxquant.result import Result
from tests.small import small_result
from tests.test_layering import sources

Reader = Callable[[Path], object]


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    write_outputs(small_result("onnxruntime"), folder)
    return folder


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}


def unsafe(text: str) -> list[str]:
    """Return what in a source text could run code that data bring along."""
    found: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in FORBIDDEN_CALLS or called in ("os.system", "os.popen"):
            found.append(called)
        if given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False":
            found.append(f"{called} with shell or pickle")
        if called == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load of anything")
        if called in ("np.load", "numpy.load") and "allow_pickle" not in given:
            found.append("np.load that does not say allow_pickle=False")
    return found


def test_no_source_runs_what_data_say() -> None:
    assert not {path: found for path, text in sources().items() if (found := unsafe(text))}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "import yaml",
    ],
)
def test_the_scanner_has_teeth(text: str) -> None:
    assert unsafe(text)


READERS: dict[str, Reader] = {
    "model.pt2": lambda p: load_model(str(p)),
    "images.npz": lambda p: load_calibration(str(p), ImageOptions(), 8),
    "images.npy": lambda p: load_calibration(str(p), ImageOptions(), 8),
    "arrays.npz": read_arrays,
    "ranges.npz": Ranges.load,
    "sensitivity.npz": SensitivityMatrix.load,
    "rounding.npz": Rounding.load,
    "held_out.safetensors": read_tensors,
    "plan.json": BitAllocation.from_json,
    "target.json": read_target,
    "document.json": lambda p: read_json(p, "plan", 1),
    "model.onnx": lambda p: inspect(p, runtime=False),
}
"""File name -> what reads it."""


def torch_pickle(path: Path, mark: Path) -> None:
    torch.save(Evil(mark), path)


def plain_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(f"cos\nmkdir\n(S'{mark}'\ntR.".encode())


def numpy_pickle(path: Path, mark: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.array([Evil(mark)], dtype=object), allow_pickle=True)


def npz_pickle(path: Path, mark: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, allow_pickle=True, header=np.array([Evil(mark)], dtype=object))


def huge_array(path: Path, mark: Path) -> None:
    del mark
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header.npy", npy_header((10**13,)))


def huge_npy(path: Path, mark: Path) -> None:
    del mark
    path.write_bytes(npy_header((10**13,)))


def npy_header(shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@cache
def packed_zeros() -> bytes:
    """Return 300 MB of zeros packed into 300 kB."""
    stream = io.BytesIO()
    zeros = npy_header((3 * 10**8 // 8,)) + bytes(3 * 10**8)
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("x.npy", zeros)
    return stream.getvalue()


def bomb(path: Path, mark: Path) -> None:
    del mark
    path.write_bytes(packed_zeros())


def huge_safetensors(path: Path, mark: Path) -> None:
    del mark
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**13], "data_offsets": [0, 4 * 10**13]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def endless_header(path: Path, mark: Path) -> None:
    del mark
    path.write_bytes(struct.pack("<Q", 2**62) + b"{")


def names_outside(path: Path, mark: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../../outside.npy", str(mark), "a\n.npy"):
            archive.writestr(name, b"x")


def bad_text(path: Path, mark: Path) -> None:
    del mark
    path.write_bytes(b'{"kind": "plan", "version": 1, "choices": {"\xff\xfe": 1}}')


def a_link_to_a_device(path: Path, mark: Path) -> None:
    del mark
    path.symlink_to("/dev/zero")


def a_pipe(path: Path, mark: Path) -> None:
    del mark
    os.mkfifo(path)


HOSTILE = [
    *(torch_pickle, plain_pickle, numpy_pickle, npz_pickle, huge_array, huge_npy, bomb, huge_safetensors),
    *(endless_header, names_outside, bad_text, a_link_to_a_device, a_pipe),
]


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", READERS)
def test_every_reader_refuses(name: str, make: Callable[[Path, Path], None], tmp_path: Path) -> None:
    path, mark = tmp_path / name, tmp_path / "mark"
    make(path, mark)
    with pytest.raises(FxquantError, match=path.stem) as caught:
        READERS[name](path)
    assert caught.value.exit_code == 2
    assert [made.name for made in tmp_path.iterdir()] == [name]


def test_the_command_line_refuses_pickles(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "mark"
    evil = {end: tmp_path / f"evil.{end}" for end in ("pt", "pt2", "npz", "npy", "onnx", "json")}
    for path in evil.values():
        (npz_pickle if path.suffix == ".npz" else torch_pickle)(path, mark)
    out, calibration = str(tmp_path / "out"), ["--calibration", "tests.small:images"]
    commands = [
        ["quantize", "--model", str(evil[end]), *calibration, "--output", out, "--budget", "average_bits=4"]
        for end in ("pt", "pt2")
    ]
    commands += [
        ["analyze", "--model", "tests.small:small", "--calibration", str(evil[end]), "--output", out]
        for end in ("npz", "npy", "pt")
    ]
    commands += [["inspect", str(evil["onnx"])], ["check", str(saved), "--onnx", str(evil["onnx"])]]
    commands += [["check", str(saved), "--data", str(evil["npz"])], ["export", str(saved), "--plan", str(evil["json"])]]
    for command in commands:
        assert main(command) in (1, 2), command
        assert capsys.readouterr().err.startswith("fxquant: error: "), command
        assert not mark.exists()


def test_a_result_folder_of_pickles(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name in sorted(path.name for path in saved.iterdir() if path.suffix in (".npz", ".pt2", ".safetensors")):
        folder = tmp_path / "result"
        shutil.copytree(saved, folder)
        (npz_pickle if name.endswith(".npz") else torch_pickle)(folder / name, mark)
        with pytest.raises(FileFormatError, match=name):
            Result.load(folder)
        assert not mark.exists()
        shutil.rmtree(folder)


def test_names_in_a_result_do_not_lead_outside(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "result"
    shutil.copytree(saved, folder)
    (folder / "sensitivity_x").mkdir()
    shutil.copy(folder / "sensitivity_diagonal.npz", tmp_path / "outside.npz")
    document = json.loads((folder / "result.json").read_text())
    document["estimators"] = ["x/../../outside"]
    (folder / "result.json").write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match=r"estimator 'x/\.\./\.\./outside'"):
        Result.load(folder)


def test_images_that_mean_harm(tmp_path: Path) -> None:
    options = ImageOptions((4, 4))
    for name, data in {
        # PostScript, which Pillow would hand to Ghostscript.
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
        "huge.ppm": b"P6 200000 200000 255\n",
        "cut.gif": b"GIF89a\xff\xff\xff\xff\x00\x00\x00",
        "pickle.jpg": b"cos\nmkdir\n(S'x'\ntR.",
        "broken.tif": b"II*\x00\xff\xff\xff\xff",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FxquantError, match=name):
            collect(load_calibration(str(tmp_path), options, 8), ["x"])
        (tmp_path / name).unlink()
    (tmp_path / "\x1b[2J\n.png").symlink_to("/etc/passwd")
    Image.new("RGB", (4, 4)).save(tmp_path / "z.png")
    with pytest.raises(FxquantError, match="cannot be read"):
        collect(load_calibration(str(tmp_path), options, 8), ["x"])
