"""Every reader of files in one table: what reads, and how a good file for it is made."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fxquant.cli import ImageOptions, inspect, load_calibration, load_model
from fxquant.core.facts import (
    BitAllocation,
    ChannelScales,
    Ranges,
    Rounding,
    SensitivityMatrix,
    UnitRecord,
    WeightGrids,
    read_target,
)
from fxquant.core.host import Timing, TimingCache
from fxquant.core.ir import Choice, Grid, activation_spec
from fxquant.core.run import CalibrationSet, collect
from fxquant.core.storage import (
    READY,
    ScoreStore,
    finish,
    read_arrays,
    read_json,
    read_tensors,
    write_arrays,
    write_json,
    write_tensors,
)
from fxquant.outputs import known_extras, write_outputs
from fxquant.result import Result
from tests.small import small_result

TARGET: dict[str, Any] = {
    "name": "npu",
    "kernels": {"conv": "c", "linear": "l"},
    "joins": ["add"],
    "weight_bits": [4, 8],
}
TARGET |= {"activation_bits": [8], "storage_bits": {"4": 4, "8": 8}, "granularity": "per_tensor"}
TARGET |= {"latency": [{"layers": "*", "precision": "W8A8", "ms": 0.5}]}
PLAN = BitAllocation(
    {"stem": Choice(8, 8), "head": Choice(4, 8)},
    *("diagonal", 0.5, 0.25, 0.5, "feasible"),
    used={"average_bits": 4.5},
    limits={"average_bits": 5.0},
    measured_loss=0.5,
    finalists={"diagonal": 0.5},
)
ROUNDING = Rounding(
    PLAN.choices,
    "pdquant",
    weights={"stem": torch.ones(2, 3)},
    activations={"group": Grid(activation_spec(8), torch.tensor(0.125), torch.tensor(3, dtype=torch.int32))},
    units=(UnitRecord("stem", "pdquant", 0.5, 0.25, True, "", 1.5, ("stem",)),),
)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@dataclass(frozen=True)
class Reader:
    """How one kind of file is read.

    Args:
        name: what the file is called in its folder.
        read: reads a file.
        write: makes a good file at a path.
        opens: functions of the source that open such files, `file:function`, with blanks between them.
        forgiving: damage is no error: nothing is returned, and what the file held is made again.
        accepts: damages that are none to this reader, with blanks between them.
        nan: array that may hold NaN.
    """

    name: str
    read: Callable[[Path], object]
    write: Callable[[Path], object]
    opens: str
    forgiving: bool = False
    accepts: str = ""
    nan: str = ""

    def made(self, folder: Path) -> Path:
        """Return the path of a good file in an empty folder."""
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self.write(path)
        return path


@cache
def saved() -> dict[str, bytes]:
    """Return the files of a small network's outputs, by name."""
    with tempfile.TemporaryDirectory() as folder:
        write_outputs(small_result("onnxruntime"), Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def copied(path: Path) -> None:
    """Write the file of this name of the small network's outputs."""
    path.write_bytes(saved()[path.name])


def unpacked(path: Path) -> None:
    """Write all files of the small network's outputs."""
    for name, data in saved().items():
        (path.parent / name).write_bytes(data)


def shown(path: Path) -> None:
    """Read a result and show it in all ways that cost nothing."""
    result = Result.load(path.parent)
    _ = result.summary(), repr(result), result._repr_html_()


def plan_shown(path: Path) -> None:
    """Read a plan and show it in all ways."""
    plan = BitAllocation.from_json(path)
    _ = plan.to_json(), repr(plan), plan._repr_html_(), plan.slack


def images(path: Path) -> object:
    """Read images from one file."""
    return load_calibration(str(path), ImageOptions(), 8)


def scores(path: Path) -> ScoreStore:
    """Return the store whose folder has this file."""
    return ScoreStore(path.parent, {"model": "a", "data": "b"})


def arrays(**made: np.ndarray[Any, Any]) -> Callable[[Path], None]:
    """Return a writer of an npz."""
    return lambda path: write_arrays(path, made)


def document(kind: str, **body: object) -> Callable[[Path], None]:
    """Return a writer of a JSON document of version 1."""
    return lambda path: write_json(path, kind, 1, body)


TIMES = TimingCache(Path("/nowhere"))._path("k")
assert TIMES is not None
NO_FILE = "missing folder device pipe"
"""Without its list a move is over, and a folder holds other images."""

CORE, CODECS, CELLS = "fxquant/core", "fxquant/core/storage/codecs.py", "fxquant/core/storage/cells.py"
EXPORTED = " ".join(f"fxquant/core/storage/exported.py:{name}" for name in ("load", "load_exported", "_read"))
EXPORTED += " fxquant/cli/inputs.py:load_model fxquant/core/storage/pt2_audit.py:_check_samples"
ONNX = "backends/onnx/contents.py:inspect_onnx backends/onnx/contents.py:_bytes fxquant/cli/inspect_onnx.py:_plan"
IMAGE = ImageOptions((4, 4))
READERS = {
    "exported program": Reader("model.pt2", lambda p: load_model(str(p)), copied, EXPORTED),
    "images in an npz": Reader("x.npz", images, arrays(x=np.ones((2, 3))), "fxquant/cli/inputs.py:_from_npz", nan="x"),
    "images in an npy": Reader(
        "x.npy", images, lambda p: np.save(p, np.ones(6)), f"fxquant/cli/inputs.py:_read_npy {CODECS}:read_array"
    ),
    "one image": Reader(
        "x.png",
        lambda p: collect(load_calibration(str(p.parent), IMAGE, 8), ["x"]),
        lambda p: Image.effect_noise((16, 16), 90.0).save(p),
        "fxquant/cli/inputs.py:read_image",
        accepts=NO_FILE,
    ),
    "arrays": Reader(
        "a.npz", read_arrays, arrays(a=np.arange(40.0), b=np.array("text")), f"{CODECS}:read_arrays", nan="a"
    ),
    "tensors": Reader(
        "t.safetensors", read_tensors, lambda p: write_tensors(p, {"a": torch.ones(40)}), f"{CODECS}:read_tensors"
    ),
    "document": Reader(
        "document.json", lambda p: read_json(p, "plan", 1), document("plan", x=[0.5, {"a": 1}]), CODECS + ":read_json"
    ),
    "plan": Reader("plan.json", plan_shown, PLAN.to_json, f"{CORE}/facts/plan.py:from_json"),
    "target": Reader(
        "target.json", read_target, document("target", **TARGET), f"{CORE}/facts/target_file.py:read_target"
    ),
    "channel scales": Reader("channel_scales.npz", ChannelScales.load, copied, f"{CORE}/facts/channel_scales.py:load"),
    "ranges": Reader("ranges.npz", Ranges.load, copied, f"{CORE}/facts/ranges.py:load"),
    "sensitivity": Reader(
        "sensitivity_fisher_out.npz",
        SensitivityMatrix.load,
        copied,
        f"{CORE}/facts/sensitivity_matrix.py:load",
        nan="stderr",
    ),
    "rounding": Reader("rounding.npz", Rounding.load, ROUNDING.save, f"{CORE}/facts/rounding.py:load"),
    "rounded weights": Reader(
        "rounded_weights.npz",
        lambda p: small_result("onnxruntime").program[WeightGrids].with_rounded(p),
        arrays(**{"stem:4": np.ones((4, 1, 3, 3), np.int8)}),
        f"{CORE}/facts/weight_grids.py:with_rounded",
    ),
    "result": Reader("result.json", shown, unpacked, "fxquant/result.py:load"),
    "held-out images": Reader("held_out.safetensors", CalibrationSet.load, copied, f"{CORE}/run/data.py:load"),
    "measurements of a report": Reader(
        "report.json",
        lambda p: known_extras(small_result("onnxruntime"), p.parent) or None,
        copied,
        "fxquant/outputs.py:known_extras",
        forgiving=True,
    ),
    "identity of scores": Reader("identity.json", scores, scores, f"{CELLS}:__init__", accepts="missing"),
    "cell of scores": Reader(
        "cell.npz",
        lambda p: scores(p).get("cell"),
        lambda p: scores(p).put("cell", {"losses": np.arange(9.0)}),
        f"{CELLS}:_read",
        forgiving=True,
        nan="losses",
    ),
    "list of a move": Reader(
        f"{READY}/files.json",
        lambda p: finish(p.parent.parent),
        document("files", files=["plan.json"], stale=["model.onnx"]),
        f"{CORE}/storage/staging.py:finish",
        accepts=NO_FILE,
    ),
    "kept times": Reader(
        str(TIMES.relative_to("/nowhere")),
        lambda p: TimingCache(p.parents[2]).get("k", 1),
        lambda p: TimingCache(p.parents[2]).put("k", [Timing(1.0, 0.1)]),
        f"{CORE}/host/timing_cache.py:get",
        forgiving=True,
    ),
    "ONNX model": Reader("model.onnx", lambda p: inspect(p, runtime=False), copied, ONNX),
}
"""Kind of file -> how it is read."""

OPENED_ELSEWHERE = {
    "backends/onnx/runtime_trace.py": "models that ONNX Runtime has just written",
    "backends/onnx/session.py": "models that fxquant or ONNX Runtime has just written",
    "fxquant/core/host/processor.py": "what the system says of the processor: tests/core/host/test_processor.py",
    "fxquant/core/storage/lock.py": "a name that only a message shows: tests/core/storage/test_lock.py",
    "fxquant/demo/network.py": "the shipped weights: tests/demo/test_demo_network.py",
    "fxquant/parity/edge_check.py": "a model given to check: test_the_command_line_refuses_pickles",
    "fxquant/report/html.py": "the shipped template",
    "passes/allocation/cbc.py": "what the solver wrote: tests/passes/allocation/test_cbc.py",
    "passes/sensitivity/cell_sweep.py": "what another process sent",
}
"""Source file that opens files of no table row -> what they are."""
