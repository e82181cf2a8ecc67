"""A `.pt2` file in, a quantized `.pt2` file out: the model's source is not needed.

python examples/exported_program.py [folder]: half a minute. The same from the shell:

    fxquant quantize --model model.pt2 --calibration images.npz --budget average_bits=6 --output quantized
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

import fxquant


def main(folder: Path) -> fxquant.Result:
    """Write a float `.pt2`, quantize it, write the integer graph as `.pt2`, read it back and compare."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, 16, 16)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    batch = ({0: Dim("batch", min=1, max=1024)},)  # a file traced for one batch size would run no other
    torch.export.save(torch.export.export(network.eval(), (images[:2],), dynamic_shapes=batch), folder / "model.pt2")

    exported = torch.export.load(folder / "model.pt2")
    result = fxquant.quantize(exported, images, fxquant.Budget(average_bits=6), effort="fast", progress=False)
    print(result.summary())

    lowered = fxquant.lower(result, "fx_int8")  # a graph of PyTorch's kernels, which torch.export can write
    integers = torch.export.export(lowered, (images[:2],), dynamic_shapes=batch)
    torch.export.save(integers, folder / "quantized.pt2")
    again = torch.export.load(folder / "quantized.pt2").module()
    torch.testing.assert_close(again(images), lowered(images))
    print(f"{folder / 'quantized.pt2'} answers as the integer graph does, in any process that imports fxquant")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
