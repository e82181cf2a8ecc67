"""Somebody's own accelerator, described in a file: which ops, which widths, what a layer takes.

python examples/custom_target.py [folder]: half a minute. `npu.json` beside this script is the description.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import fxquant

DESCRIPTION = Path(__file__).parent / "npu.json"


def main(folder: Path) -> fxquant.Result:
    """Find the most precise model that takes at most 60 % of the accelerator's time for 8 bits everywhere."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, 16, 16)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
    widest = fxquant.quantize(model, images, None, bits=(4, 8), target=str(DESCRIPTION), effort="fast", progress=False)
    milliseconds = widest.costs["latency"].of(widest.allocation.choices)
    result = fxquant.resolve(widest, fxquant.Budget(latency_ms=0.6 * milliseconds), progress=False)
    print(result.summary())
    result.save(folder / "result")  # holds a copy of the description
    print(f"{milliseconds:.3g} ms at 8 bits, {result.allocation.used['latency_ms']:.3g} ms by the plan")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
