"""What accuracy do equal bytes on disk buy: the default, uniform plans, older defaults, and other projects?

`python -m benchmarks.equal_bytes [network ...] [--only part,...]`: files of .05 to .25 of the float ONNX file, accuracy
and KL on images that nothing was tuned on, by ONNX Runtime, and processor seconds for all files of a contestant. Three
contestants are the default with other candidate formats. `FXQUANT_BEFORE` names an older checkout to compare with.
`FXQUANT_PEERS_PYTHON` names the Python of an environment with torch, model-compression-toolkit, nvidia-modelopt and
brevitas: peers are simulated, `benchmarks.peer_quantizers` says how their bytes are counted. Each contestant runs in a
process of its own (`benchmarks.equal_bytes_contestants`, `benchmarks.equal_bytes_peers`); finished ones are kept in
`build/equal_bytes`, so that a run can go on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.equal_bytes_contestants import CONTESTANTS
from benchmarks.peer_quantizers import PEERS
from benchmarks.report_table import RESULTS, write
from benchmarks.zoo import NETWORKS
from fxquant.api import capture
from fxquant.backends.onnx import executable, export_onnx
from fxquant.core.errors import FileFormatError
from fxquant.core.run import LOSSES, model_outputs
from fxquant.core.storage import read_json

FOLDER = Path("build/equal_bytes")
CASES = {"resnet20": 256, "mobilenet_v1": 128, "mobilenet_v2": 128, "efficientnet_lite0": 128, "deit_tiny": 64}
"""Network -> calibration images."""
EVALUATION = {"resnet20": 1017}
"""Network -> evaluation images, where it is not 500."""
RATIOS = {"mobilenet_v1": (0.11, 0.14, 0.15, 0.2), "resnet20": (0.05, 0.065, 0.085, 0.11, 0.14, 0.17, 0.2, 0.25)}
"""Network -> bytes of the files over those of the float file, where they are not the three below."""
FEWER_RATIOS = (0.085, 0.11, 0.14)
SEEDS = {name: {"default": (0, 1, 2), "uniform": (0, 1, 2)} for name in ("resnet20", "mobilenet_v1")}
"""Network, contestant -> seeds of the order of calibration images and of all draws, where there is more than (0,)."""
SMALL = ("resnet20", "mobilenet_v1")
OTHER_CANDIDATES = {"2c 3c 4 8": SMALL, "2 4 8": SMALL, "before": SMALL, "seven formats": ("resnet20",)}
"""Contestant -> networks it is run on, where they are not all."""
BEFORE, PEERS_PYTHON = "FXQUANT_BEFORE", "FXQUANT_PEERS_PYTHON"

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


def command(network: str, name: str, folder: Path, seed: int) -> list[str]:
    """Return the command line of a contestant's process."""
    program, threads = Path(__file__).with_name("equal_bytes_contestants.py"), str(torch.get_num_threads())
    ratios = map(str, RATIOS.get(network, FEWER_RATIOS))
    if name in PEERS:
        start = [os.environ[PEERS_PYTHON], "-W", "ignore", "-m", "benchmarks.equal_bytes_peers", name, network]
        return [*start, str(folder), str(seed), threads, str(EVALUATION.get(network, 500)), *ratios]
    return [sys.executable, str(program), name, str(folder), str(seed), threads, *ratios]


def wrote(network: str, name: str, folder: Path, seed: int) -> str:
    """Run a contestant on a network unless it is done; return what is left out and why, mostly nothing."""
    place = folder / f"{name}-{seed}"
    if not (place / "seconds").is_file():
        needed = BEFORE if name == "before" else PEERS_PYTHON if name in PEERS else "PATH"
        if needed not in os.environ:
            return f"{needed} is not set"
        path = os.environ[BEFORE] if name == "before" else str(Path(__file__).resolve().parents[1])
        place.mkdir(parents=True, exist_ok=True)
        with (place / "log").open("w") as log:
            ended = subprocess.run(
                command(network, name, folder, seed),
                env={**os.environ, "PYTHONPATH": path},
                stdout=log,
                stderr=log,
                check=False,
            )
        if ended.returncode:
            last = ["it ended without a word", *(place / "log").read_text().strip().splitlines()][-1][:200]
            if name in PEERS:
                return last
            raise RuntimeError(f"{name} failed on {network}: {last}; see {place / 'log'}")
    return (place / "left_out").read_text() if (place / "left_out").is_file() else ""


def answered(path: Path, images: Tensor) -> tuple[float, Tensor]:
    """Return the bytes of a file and its answers: by ONNX Runtime, or as a peer's process left them."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return float(arrays["bytes"]), torch.from_numpy(arrays["answers"])
    run = executable(path.read_bytes())
    return path.stat().st_size, torch.cat([run((images[k : k + 8],)) for k in range(0, len(images), 8)])


def measure(name: str, contestants: Container[str]) -> tuple[list[Row], list[str]]:
    """Return the rows of one network, for each file the mean over seeds, and what is left out."""
    folder, images, labels, reference, float_bytes = prepared(name)
    right = 100 * float((reference.argmax(dim=1) == labels).double().mean())
    rows: list[Row] = [{"network": name, "contestant": "float", "file": "", "bytes": float_bytes, "accuracy %": right}]
    left_out = []
    for contestant in [each for each in (*CONTESTANTS, *PEERS) if name in OTHER_CANDIDATES.get(each, CASES)]:
        if contestant not in contestants:
            continue
        found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        seconds = []
        for seed in SEEDS.get(name, {}).get(contestant, (0,)):
            reason = wrote(name, contestant, folder, seed)
            left_out += [f"{contestant}: {reason}"] if reason else []
            place = folder / f"{contestant}-{seed}"
            if not (place / "seconds").is_file():
                continue
            seconds.append(float((place / "seconds").read_text()))
            for path in sorted([*place.glob("*.onnx"), *place.glob("*.npz")]):
                size, answer = answered(path, images)
                correct = 100 * float((answer.argmax(dim=1) == labels).double().mean())
                kl = float(LOSSES["kl"](reference, answer, None).mean())
                found[path.stem].append((size, correct, kl))
        for what, seen in found.items():
            mean = [statistics.fmean(values) for values in zip(*seen, strict=True)]
            spread = max(values[1] for values in seen) - min(values[1] for values in seen)
            row: Row = {"network": name, "contestant": contestant, "file": what, "bytes": mean[0]}
            row |= {"ratio": mean[0] / float_bytes, "accuracy %": mean[1], "KL": mean[2]}
            row |= {"accuracy, most - least": spread, "seeds": float(len(seen))}
            rows.append(row | {"processor s, all files": round(statistics.fmean(seconds), 1)})
    return rows, left_out


def known(name: str) -> tuple[list[Row], Mapping[str, Any]]:
    """Return the rows and what else the JSON of a network holds, nothing where there is none."""
    with suppress(FileFormatError):
        document = read_json(RESULTS / f"equal_bytes_{name}.json", "benchmark", 1)
        return document["rows"], document["meta"]
    return [], {}


def joined(
    rows: list[Row], meta: dict[str, object], before: tuple[list[Row], Mapping[str, Any]], only: Container[str]
) -> tuple[list[Row], dict[str, object]]:
    """Return rows and meta with the earlier rows of contestants that were not asked for.

    Rows of other images are left out: they are not to be compared with.

    Args:
        rows: of this run, the first of them of the float network.
        meta: of this run.
        before: rows and meta of the JSON.
        only: contestants of this run.
    """
    old, then = before
    if any(then.get(images) != meta[images] for images in ("calibration images", "evaluation images")):
        return rows, meta
    kept = [row for row in old if row["contestant"] != "float" and row["contestant"] not in only]
    order = ["float", *CONTESTANTS, *PEERS]
    reasons = [reason for reason in then["left out"] if reason.split(":")[0] not in only]
    found = sorted([*rows, *kept], key=lambda row: order.index(str(row["contestant"])))
    return found, meta | {"left out": [*cast(list[str], meta["left out"]), *reasons]}


def main() -> None:
    """Measure, print the table, write the JSON of each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="network", help=f"default: {' '.join(CASES)}")
    parser.add_argument(
        "--only",
        default="",
        help='contestants, comma-separated, "peers" for all peers; rows of others stay in the JSON',
    )
    given = parser.parse_args()
    only = given.only.replace("peers", ",".join(PEERS)).split(",") if given.only else [*CONTESTANTS, *PEERS]
    for name in given.names or CASES:
        rows, left_out = measure(name, only)
        meta: dict[str, object] = {"calibration images": CASES[name], "left out": left_out}
        meta |= {"evaluation images": EVALUATION.get(name, 500), "seeds": SEEDS.get(name, (0,))}
        meta |= {"threads": torch.get_num_threads()}
        write(f"equal_bytes_{name}", *joined(rows, meta, known(name), only))


if __name__ == "__main__":
    main()
