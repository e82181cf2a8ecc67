"""Your own convolutional network, from float to an ONNX file that ONNX Runtime runs in integers.

python examples/own_cnn.py [folder]: trains nothing, downloads nothing; half a minute.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxquant


class Net(nn.Module):
    """Stands for your network: a stem, a residual block, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores of ten classes."""
        x = self.stem(images)
        x = torch.relu(x + self.block(x))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def main(folder: Path) -> fxquant.Result:
    """Quantize to an eighth of the bytes, export, run the file, and return the result."""
    torch.manual_seed(0)
    model = Net().eval()  # load_state_dict(torch.load("yours.pt", weights_only=True)) goes here
    # Any loader will do; labels are ignored.
    dataset = TensorDataset(torch.randn(128, 3, 32, 32), torch.zeros(128, dtype=torch.long))
    result = fxquant.quantize(
        model, DataLoader(dataset, batch_size=32), fxquant.Budget(size_ratio=0.25), effort="fast", progress=False
    )
    print(result.summary())

    import onnxruntime

    report = result.to_onnx(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 32, 32)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        same = (torch.from_numpy(logits).argmax(1) == model(images).argmax(1)).sum()
    print(f"{report.bytes} bytes of ONNX; {int(same)} of 5 answers are the float model's")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
