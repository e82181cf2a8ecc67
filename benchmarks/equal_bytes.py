"""What accuracy do equal bytes on disk buy: the default, uniform plans, and the defaults of an older checkout?

`python -m benchmarks.equal_bytes [network ...]`: files of .05 to .25 of the float ONNX file, accuracy and KL on images
that nothing was tuned on, by ONNX Runtime, and processor seconds for all files of a contestant. Three contestants are
the default with other candidate formats. `FXQUANT_BEFORE` names an older checkout to compare with. Each contestant runs
in a process of its own (`benchmarks.equal_bytes_contestants`); finished ones are kept in `build/equal_bytes`, so that a
run can go on.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.arguments import asked
from benchmarks.equal_bytes_contestants import CONTESTANTS
from benchmarks.report_table import write
from benchmarks.zoo import NETWORKS
from fxquant.api import capture
from fxquant.backends.onnx import executable, export_onnx
from fxquant.core.run import LOSSES, model_outputs

FOLDER = Path("build/equal_bytes")
CASES = {"resnet20": 256, "mobilenet_v1": 128, "mobilenet_v2": 128, "efficientnet_lite0": 128, "deit_tiny": 64}
"""Network -> calibration images."""
EVALUATION = {"resnet20": 1017}
"""Network -> evaluation images, where it is not 500."""
RATIOS = {"mobilenet_v1": (0.11, 0.14, 0.15, 0.2), "resnet20": (0.05, 0.065, 0.085, 0.11, 0.14, 0.17, 0.2, 0.25)}
"""Network -> bytes of the files over those of the float file, where they are not the three below."""
FEWER_RATIOS = (0.085, 0.11, 0.14)
SEEDS = {"resnet20": {"default": (0, 1, 2), "uniform": (0, 1, 2)}}
"""Network, contestant -> seeds of the order of calibration images and of all draws, where there is more than (0,)."""
OTHER_CANDIDATES = {"2 4 8": ("resnet20", "mobilenet_v1"), "seven formats": ("resnet20",)}
"""Contestant -> networks it is run on, where they are not all."""

Row = dict[str, str | float | None]


def prepared(name: str) -> tuple[Path, Tensor, Tensor, Tensor, int]:
    """Return a network's folder, its evaluation images, labels and float answers, and the bytes of its float file."""
    network, folder = NETWORKS[name], FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = network.evaluation(EVALUATION.get(name, 500))
    calibration, model = network.calibration(CASES[name]), network.factory()
    batch = torch.export.Dim("batch", min=1, max=4096)
    torch.export.save(
        torch.export.export(model, (calibration[:2],), dynamic_shapes=({0: batch},)), folder / "model.pt2"
    )
    np.savez(folder / "calibration.npz", images=calibration.numpy())
    program = capture(model, calibration[:2])
    size = export_onnx(program.module, folder / "float.onnx").bytes
    return folder, images, labels, model_outputs(program.module, (images,), 16), size


def wrote(network: str, name: str, folder: Path, seed: int) -> bool:
    """Run a contestant on a network unless it is done; return whether there are files."""
    if not (folder / f"{name}-{seed}" / "seconds").is_file():
        older = os.environ.get("FXQUANT_BEFORE")
        if name == "before" and older is None:
            return False
        here = Path(__file__).resolve()
        path = str(here.parents[1]) if name != "before" else str(older)
        command = [sys.executable, str(here.parent / "equal_bytes_contestants.py"), name, str(folder), str(seed)]
        more = [str(torch.get_num_threads()), *map(str, RATIOS.get(network, FEWER_RATIOS))]
        subprocess.run([*command, *more], env={**os.environ, "PYTHONPATH": path}, check=True, cwd=Path.cwd())
    return True


def measure(name: str) -> list[Row]:
    """Return the rows of one network: for each file the mean over seeds."""
    folder, images, labels, reference, size = prepared(name)
    right = 100 * float((reference.argmax(dim=1) == labels).double().mean())
    rows: list[Row] = [{"network": name, "contestant": "float", "file": "", "bytes": size, "accuracy %": right}]
    for contestant in (each for each in CONTESTANTS if name in OTHER_CANDIDATES.get(each, CASES)):
        found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        seconds = []
        for seed in SEEDS.get(name, {}).get(contestant, (0,)):
            if not wrote(name, contestant, folder, seed):
                continue
            seconds.append(float((folder / f"{contestant}-{seed}" / "seconds").read_text()))
            for path in sorted((folder / f"{contestant}-{seed}").glob("*.onnx")):
                run = executable(path.read_bytes())
                answer = torch.cat([run((images[k : k + 8],)) for k in range(0, len(images), 8)])
                correct = 100 * float((answer.argmax(dim=1) == labels).double().mean())
                kl = float(LOSSES["kl"](reference, answer, None).mean())
                found[path.stem].append((path.stat().st_size, correct, kl))
        for what, seen in found.items():
            mean = [statistics.fmean(values) for values in zip(*seen, strict=True)]
            spread = max(values[1] for values in seen) - min(values[1] for values in seen)
            row: Row = {"network": name, "contestant": contestant, "file": what, "bytes": mean[0]}
            row |= {"ratio": mean[0] / size, "accuracy %": mean[1], "KL": mean[2]}
            row |= {"accuracy, most - least": spread, "seeds": float(len(seen))}
            rows.append(row | {"processor s, all files": round(statistics.fmean(seconds), 1)})
    return rows


def main() -> None:
    """Measure, print the table, write the JSON of each network."""
    for name in asked(__doc__, "network", CASES):
        meta: dict[str, object] = {"calibration images": CASES[name]}
        meta |= {"evaluation images": EVALUATION.get(name, 500), "seeds": SEEDS.get(name, (0,))}
        write(f"equal_bytes_{name}", measure(name), meta | {"threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
