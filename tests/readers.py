"""Every reader of files in one table: what reads, and how a good file for it is made."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fxquant.cli import ImageOptions, inspect, load_calibration, load_model
from fxquant.core.facts import BitAllocation, Ranges, Rounding, SensitivityMatrix, UnitRecord, WeightGrids, read_target
from fxquant.core.host import Timing, TimingCache
from fxquant.core.ir import Choice, Grid, activation_spec
from fxquant.core.run import collect
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

IDENTITY = {"model": "a", "data": "b"}
TARGET = {"name": "npu", "kernels": {"conv": "c", "linear": "l"}, "joins": ["add"], "weight_bits": [4, 8]}
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
        read: reads a file.
        write: makes a good file at a path.
        opens: functions of the source that open such files, `file:function`.
        name: what the file is called in its folder.
        forgiving: damage is no error: nothing is returned, and what the file held is made again.
        accepts: damages that are none to this reader.
        nan: arrays that may hold NaN.
    """

    read: Callable[[Path], object]
    write: Callable[[Path], object]
    opens: tuple[str, ...]
    name: str
    forgiving: bool = False
    accepts: frozenset[str] = frozenset()
    nan: frozenset[str] = frozenset()

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


def npz(path: Path) -> object:
    """Read images."""
    return load_calibration(str(path), ImageOptions(), 8)


TIMES = TimingCache(Path("/nowhere"))._path("k")
assert TIMES is not None
ABSENT = frozenset({"missing"})
"""Without the file there is nothing to read."""
NO_FILE = frozenset({"missing", "folder", "device", "pipe"})
"""Without its list a move is over, and a folder holds other images."""

CODECS, FACTS = "fxquant/core/storage/codecs.py", "fxquant/core/facts"
READERS = {
    "exported program": Reader(
        lambda p: load_model(str(p)),
        copied,
        (
            *("fxquant/cli/inputs.py:load_model", "fxquant/core/storage/exported.py:load_exported"),
            "fxquant/core/storage/pt2_audit.py:_check_samples",
        ),
        "model.pt2",
    ),
    "images in an npz": Reader(
        npz,
        lambda p: write_arrays(p, {"x": np.ones((2, 3))}),
        ("fxquant/cli/inputs.py:_from_npz",),
        "x.npz",
        nan=frozenset({"x"}),
    ),
    "images in an npy": Reader(
        npz, lambda p: np.save(p, np.ones((2, 3))), ("fxquant/cli/inputs.py:_read_npy", f"{CODECS}:read_array"), "x.npy"
    ),
    "one image": Reader(
        lambda p: collect(load_calibration(str(p.parent), ImageOptions((4, 4)), 8), ["x"]),
        lambda p: Image.effect_noise((16, 16), 90.0).save(p),
        ("fxquant/cli/inputs.py:read_image",),
        "x.png",
        accepts=NO_FILE,
    ),
    "arrays": Reader(
        read_arrays,
        lambda p: write_arrays(p, {"a": np.arange(40.0), "b": np.array("text")}),
        (f"{CODECS}:read_arrays",),
        "arrays.npz",
        nan=frozenset({"a"}),
    ),
    "tensors": Reader(
        read_tensors,
        lambda p: write_tensors(p, {"a": torch.arange(40.0)}),
        (f"{CODECS}:read_tensors",),
        "t.safetensors",
    ),
    "document": Reader(
        lambda p: read_json(p, "plan", 1),
        lambda p: write_json(p, "plan", 1, {"x": [0.5, None], "y": {"a": 1}}),
        (f"{CODECS}:read_json",),
        "document.json",
    ),
    "plan": Reader(plan_shown, PLAN.to_json, (f"{FACTS}/plan.py:from_json",), "plan.json"),
    "target": Reader(
        read_target,
        lambda p: write_json(p, "target", 1, TARGET),
        (f"{FACTS}/target_file.py:read_target",),
        "target.json",
    ),
    "ranges": Reader(Ranges.load, copied, (f"{FACTS}/ranges.py:load",), "ranges.npz"),
    "sensitivity": Reader(
        SensitivityMatrix.load,
        copied,
        (f"{FACTS}/sensitivity_matrix.py:load",),
        "sensitivity_diagonal.npz",
        nan=frozenset({"stderr"}),
    ),
    "rounding": Reader(Rounding.load, ROUNDING.save, (f"{FACTS}/rounding.py:load",), "rounding.npz"),
    "rounded weights": Reader(
        lambda p: small_result("onnxruntime").program[WeightGrids].with_rounded(p),
        lambda p: write_arrays(p, {"stem:4": np.ones((4, 1, 3, 3), np.int8)}),
        (f"{FACTS}/weight_grids.py:with_rounded",),
        "rounded_weights.npz",
    ),
    "result": Reader(shown, unpacked, ("fxquant/result.py:load", "fxquant/result.py:_load_held_out"), "result.json"),
    "measurements of a report": Reader(
        lambda p: known_extras(small_result("onnxruntime"), p.parent) or None,
        copied,
        ("fxquant/outputs.py:known_extras",),
        "report.json",
        forgiving=True,
    ),
    "identity of scores": Reader(
        lambda p: ScoreStore(p.parent, IDENTITY),
        lambda p: ScoreStore(p.parent, IDENTITY),
        ("fxquant/core/storage/cells.py:__init__",),
        "identity.json",
        accepts=ABSENT,
    ),
    "cell of scores": Reader(
        lambda p: ScoreStore(p.parent, IDENTITY).get("cell"),
        lambda p: ScoreStore(p.parent, IDENTITY).put("cell", {"losses": np.arange(9.0)}),
        ("fxquant/core/storage/cells.py:_read",),
        "scores/cell.npz",
        forgiving=True,
        nan=frozenset({"losses"}),
    ),
    "list of a move": Reader(
        lambda p: finish(p.parent.parent),
        lambda p: write_json(p, "files", 1, {"files": ["plan.json"], "stale": ["model.onnx"]}),
        ("fxquant/core/storage/staging.py:finish",),
        f"{READY}/files.json",
        accepts=NO_FILE,
    ),
    "kept times": Reader(
        lambda p: TimingCache(p.parents[2]).get("k", 1),
        lambda p: TimingCache(p.parents[2]).put("k", [Timing(1.0, 0.1, 0.0, 0.2)]),
        ("fxquant/core/host/timing_cache.py:get",),
        str(TIMES.relative_to("/nowhere")),
        forgiving=True,
    ),
    "ONNX model": Reader(
        lambda p: inspect(p, runtime=False),
        copied,
        (
            *("backends/onnx/contents.py:inspect_onnx", "backends/onnx/contents.py:_bytes"),
            "fxquant/cli/inspect_onnx.py:_plan",
        ),
        "model.onnx",
    ),
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
