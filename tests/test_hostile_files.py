"""Files that mean harm: nothing in them is run, whatever command reads them, and each ends in one error of ours."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from fxquant.cli import ImageOptions, load_calibration, main
from fxquant.core.errors import FileFormatError, FxquantError
from fxquant.core.run import collect
from fxquant.result import Result
from tests.readers import READERS
from tests.test_damaged_files import spoil
from tests.test_layering import sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved result to do harm to."""
    (tmp_path / "result").mkdir()
    return READERS["result"].made(tmp_path / "result").parent


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


UNSAFE = ["import pickle", "from pickle import loads", "import yaml", "eval(text)", "subprocess.run(text, shell=True)"]
UNSAFE += ["torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)"]
UNSAFE += ["np.load(path, allow_pickle=True)"]


@pytest.mark.parametrize("text", UNSAFE)
def test_the_scanner_has_teeth(text: str) -> None:
    assert unsafe(text)


def test_the_command_line_refuses_pickles(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "mark"
    evil = {end: tmp_path / f"evil.{end}" for end in ("pt", "pt2", "npz", "npy", "onnx", "json")}
    for path in evil.values():
        path.touch()
        spoil(path, "npz_pickle" if path.suffix == ".npz" else "torch_pickle", mark)
    out, calibration = str(tmp_path / "out"), ["--calibration", "tests.small:images"]
    commands = [
        ["quantize", "--model", str(evil[end]), *calibration, "--output", out, "--budget", "average_bits=4"]
        for end in ("pt", "pt2")
    ]
    commands += [
        ["analyze", "--model", "tests.small:small", "--calibration", str(evil[end]), "--output", out]
        for end in ("npz", "npy", "pt")
    ]
    commands += [["inspect", str(evil["onnx"])], ["check", str(folder), "--onnx", str(evil["onnx"])]]
    commands += [
        ["check", str(folder), "--data", str(evil["npz"])],
        ["export", str(folder), "--plan", str(evil["json"])],
    ]
    for command in commands:
        assert main(command) in (1, 2), command
        assert capsys.readouterr().err.startswith("fxquant: error: "), command
        assert not mark.exists()


def test_a_result_folder_of_pickles(folder: Path, tmp_path: Path) -> None:
    for path in [path for path in folder.iterdir() if path.suffix in (".npz", ".pt2", ".safetensors")]:
        whole = path.read_bytes()
        spoil(path, "npz_pickle" if path.suffix == ".npz" else "torch_pickle", tmp_path / "mark")
        with pytest.raises(FileFormatError, match=path.name):
            Result.load(folder)
        assert not (tmp_path / "mark").exists()
        path.write_bytes(whole)


def test_names_in_a_result_do_not_lead_outside(folder: Path, tmp_path: Path) -> None:
    (folder / "sensitivity_x").mkdir()
    shutil.copy(folder / "sensitivity_fisher_out.npz", tmp_path / "outside.npz")
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
