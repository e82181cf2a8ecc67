"""What must hold of every design, and a sweep of many: `python -m tests.family_sweep --log FILE --count 2000`.

A line of JSON a design goes to the log: its number, what became of it ("held", "refused" or "failed"), seconds, the
design and the message. A sweep that was stopped goes on behind the last line; `--first` is the first one's number.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

import fxquant
from fxquant.core.errors import FxquantError
from fxquant.result import Result
from tests.random_checks import alike
from tests.random_families import Design, draw_design, family, shown

NEAR = 0.05
"""Of its range, what a float answer of ONNX Runtime may be off at most where steps are not counted one by one."""
SAME = 0.9
"""Share of a discrete answer that has to be equal."""
OTHERS = ((16, 8), (9, 7), (12, 20))
"""Other sizes that a file of free size is run at."""
NEW_PROCESS = """
import sys, torch, fxquant
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    made = fxquant.load(sys.argv[1]).simulated(*inputs)
torch.save(torch.utils._pytree.tree_leaves(made), sys.argv[3])
"""


def holds(design: Design, folder: Path, new_process: bool = False, thorough: bool = False) -> str:
    """Require what holds of any network; return "" or, where it is refused with an error of ours, the message."""
    model, data = family(design), shown(design, 8)
    calibration = [tuple(x[k : k + 4] for x in data) for k in (0, 4)]
    bits = ((8,), (4, 8), (2, 4, 8))[design.seed % 3]
    budget = {"average_bits": 8 if bits == (8,) else 6}
    path, images = folder / "model.onnx", shown(design, 5, seed=1)
    try:
        made = fxquant.quantize(
            model,
            calibration,
            budget,
            bits=bits,
            effort="default" if thorough else "fast",
            dynamic_image=design.free or None,
            progress=False,
        )
        with torch.no_grad():
            answer = made.simulated(*images)
        before = _state(made)
        if design.exported_first:
            made.to_onnx(path)
        saved = made.save(folder / "result")
        if not design.exported_first:
            made.to_onnx(path)
    except FxquantError as error:
        if not str(error).strip():
            raise AssertionError("an error without a message") from error
        return f"{type(error).__name__}: {error}"
    after = _state(made)
    # The simulation is kept once made, so that its answer alone would not show a change of the program.
    assert after[0] == before[0], "exporting or saving changed a graph"
    assert list(after[1]) == list(before[1])
    assert all(torch.equal(after[1][name], before[1][name]) for name in before[1]), (
        "exporting or saving changed a value"
    )
    with torch.no_grad():
        wanted = model(*images)
        # Named tuples become dictionaries (fxquant.capture).
        alike(answer, wanted._asdict() if hasattr(wanted, "_asdict") else wanted)
        alike(made.simulated(*images), answer, 0.0)
        alike(fxquant.load(saved).simulated(*images), answer, 0.0)
        if new_process:
            _read_elsewhere(saved, images, answer, folder)
    found = fxquant.check(made, against=("onnxruntime",), threads=1)
    assert found.within, found.summary()
    sizes = (design.sizes, *OTHERS) if design.free else (design.sizes,)
    for size in sizes:
        _file_answers(path, made.simulated, shown(design, 5, seed=2, sizes=size))
    return ""


def _state(result: Result) -> tuple[list[str], dict[str, Tensor]]:
    """Return the graphs of a result and copies of all their values."""
    modules = {"program": result.program.module, "simulated": result.simulated}
    values = {f"{name} {key}": v.clone() for name, m in modules.items() for key, v in m.state_dict().items()}
    return [str(module.graph) for module in modules.values()], values


def _file_answers(path: Path, simulated: nn.Module, images: tuple[Tensor, ...]) -> None:
    """Require the answers of the file to have the simulation's shapes and types, and its values nearly."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), images, strict=True)}
    with torch.no_grad():
        wanted = tree_leaves(simulated(*images))
    for one, other in zip(session.run(None, given), wanted, strict=True):
        mine, theirs = np.asarray(one), other.numpy()
        size = tuple(images[0].shape)
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), (
            f"at {size}: {mine.shape} {mine.dtype}, not {theirs.shape} {theirs.dtype}"
        )
        if theirs.dtype.kind == "f":
            off = float(np.abs(mine - theirs).max()) / max(float(np.ptp(theirs)), 1e-3)
            assert off <= NEAR, f"at {size}: {off:.3f} of the range off"
        else:
            # A byte is a rounded float, which is a step off at a border.
            share = float((np.abs(mine.astype(int) - theirs.astype(int)) <= 12 * (theirs.dtype == np.uint8)).mean())
            assert share >= SAME, f"at {size}: {share:.2f} of the answers are the same"


def _read_elsewhere(saved: Path, images: tuple[Tensor, ...], answer: Any, folder: Path) -> None:
    given, made = folder / "given.pt", folder / "made.pt"
    torch.save(images, given)
    subprocess.run([sys.executable, "-c", NEW_PROCESS, saved, given, made], check=True, capture_output=True)
    alike(torch.load(made), tree_flatten(answer)[0], 0.0)


def main() -> None:
    """Sweep and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--new-process-every", type=int, default=25)
    given = parser.parse_args()
    done = len(given.log.read_text().splitlines()) if given.log.exists() else 0
    torch.set_num_threads(1)
    for number in range(given.first + done, given.first + given.count):
        design, begun = draw_design(Random(number)), time.perf_counter()
        thorough = number % 10 == 9
        try:
            with tempfile.TemporaryDirectory() as folder:
                message = holds(design, Path(folder), number % given.new_process_every == 0, thorough)
            became = "refused" if message else "held"
        except Exception as error:
            became, message = "failed", "".join(traceback.format_exception(error))[-3000:]
        row = {
            "number": number,
            "became": became,
            "seconds": round(time.perf_counter() - begun, 2),
            "thorough": thorough,
        }
        with given.log.open("a") as log:
            log.write(json.dumps({**row, "design": repr(design), "message": message}) + "\n")


if __name__ == "__main__":
    main()
