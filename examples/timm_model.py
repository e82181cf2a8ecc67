"""A model of timm or torchvision, as it is.

python examples/timm_model.py [name] [folder]: needs `pip install timm`; random weights unless you pass pretrained ones
(`timm.create_model(name, pretrained=True)` downloads them, which nothing here does).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fxquant


def main(folder: Path, name: str = "mobilenetv3_small_050") -> fxquant.Result:
    """Quantize a timm classifier to 8 bits and less, export it, and return the result."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    settings = timm.data.resolve_data_config({}, model=model)
    channels, height, width = settings["input_size"]
    # Your preprocessed images go here; `fxquant quantize --calibration FOLDER --mean .. --std ..` reads a folder.
    images = torch.randn(16, channels, height, width)
    result = fxquant.quantize(
        model, images, fxquant.Budget(average_bits=6), effort="fast", keep_float=["conv_stem"], progress=False
    )
    print(result.summary())
    result.to_onnx(folder / "model.onnx")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[2] if len(sys.argv) > 2 else "."), *sys.argv[1:2])
