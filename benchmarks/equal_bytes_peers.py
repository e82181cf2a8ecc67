"""One peer of `benchmarks.equal_bytes` in its own process, in the Python of an environment that has the peer.

`python -m benchmarks.equal_bytes_peers NAME NETWORK FOLDER SEED THREADS IMAGES RATIO ...` reads the calibration images
and the float file from the folder of the network, and writes one npz per quantized network: what it answers on the
evaluation images, simulated in torch, and the bytes that count. Beside them: `seconds` of the processor for all
networks, without the evaluation, and in `left_out` the reason why there are not more.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peer_quantizers import PEERS, Job, let_torchvision_load
from benchmarks.zoo import NETWORKS

BUDGET_SECONDS = 360.0
"""Processor seconds after which a peer starts no other network."""


@torch.no_grad()
def answers(module: nn.Module, images: Tensor) -> Tensor:
    """Return what a quantized network says about images, `(N, classes)`."""
    found = [module(images[first : first + 16]) for first in range(0, len(images), 16)]
    return torch.cat([getattr(each, "value", each) for each in found])


def run(name: str, network: str, job: Job, evaluated: int, place: Path) -> None:
    """Write one npz per network that a peer gets ready within `BUDGET_SECONDS`, the seconds, and what is left out."""
    images, _ = NETWORKS[network].evaluation(evaluated)
    seconds, left_out = 0.0, ""
    started = time.process_time()
    try:
        for what, module, layers in PEERS[name][1](job):
            seconds += time.process_time() - started
            size = job.file_bytes(layers)
            np.savez(place / f"{what}.npz", answers=answers(module, images).numpy(), bytes=size)
            widths = " ".join(str(each.bits) for each in layers)
            print(f"{what}: {size} bytes, {seconds:.0f} s so far, bits {widths}", flush=True)
            if seconds > BUDGET_SECONDS:
                left_out = f"no more files after {what}: {seconds:.0f} processor seconds were spent"
                break
            started = time.process_time()
        else:
            seconds += time.process_time() - started
    except Exception as error:
        # Whatever a peer raises is its result.
        seconds += time.process_time() - started
        left_out = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
    (place / "left_out").write_text(left_out)
    (place / "seconds").write_text(f"{seconds:.1f}")


def main() -> None:
    """Let one peer write its files, or end with the name of the package that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("folder", type=Path)
    for name in ("seed", "threads", "images"):
        parser.add_argument(name, type=int)
    parser.add_argument("ratios", type=float, nargs="+")
    given = parser.parse_args()
    missing = [each for each in PEERS[given.name][0] if importlib.util.find_spec(each) is None]
    if missing:
        sys.exit(f"{sys.executable} has no {', '.join(missing)}")
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    library = let_torchvision_load()
    folder: Path = given.folder
    with np.load(folder / "calibration.npz", allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays["images"])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(given.seed))
    size = (folder / "float.onnx").stat().st_size
    place = folder / f"{given.name}-{given.seed}"
    place.mkdir(parents=True, exist_ok=True)
    job = Job(NETWORKS[given.network].factory, images[order], tuple(given.ratios), size)
    run(given.name, given.network, job, given.images, place)
    del library


if __name__ == "__main__":
    main()
