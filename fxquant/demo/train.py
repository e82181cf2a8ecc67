"""Trains the shipped network: `python -m fxquant.demo.train`, about two minutes on two cores.

Everything random comes from one seed. There is no weight decay, so that weights keep the uneven ranges
of networks found in the wild; the exact result still depends on the machine's floating-point order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.core.storage import write_tensors
from fxquant.demo.digits import DigitsData, digits_data
from fxquant.demo.network import WEIGHTS, DigitsNet

SEED = 0
EPOCHS = 10
BATCH = 64
PEAK_RATE = 0.01

_MAX_ROTATION = 0.2
_MAX_SHIFT = 0.12
_MAX_ZOOM = 0.1


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images `(N, 1, 32, 32)` each turned, moved and zoomed a little, paper filling the rim."""
    count = len(images)

    def drawn(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2.0 - 1.0) * limit

    angle, zoom = drawn(_MAX_ROTATION), 1.0 + drawn(_MAX_ZOOM)
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    rows = torch.stack((cosine, -sine, drawn(_MAX_SHIFT), sine, cosine, drawn(_MAX_SHIFT)), dim=1).view(count, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    # "border" repeats the paper's value, which after normalisation is not zero.
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def held_out_accuracy(model: nn.Module, data: DigitsData) -> float:
    """Return top-1 accuracy in percent on the held-out images."""
    hits = 0
    with torch.inference_mode():
        # Small batches stay in the cache; all images at once would run several times slower.
        pairs = zip(torch.split(data.held_out, BATCH), torch.split(data.held_out_labels, BATCH), strict=True)
        for images, labels in pairs:
            hits += int((model(images).argmax(1) == labels).sum())
    return 100.0 * hits / len(data.held_out)


def trained(data: DigitsData, epochs: int = EPOCHS, seed: int = SEED) -> DigitsNet:
    """Return a network trained on `data.train` with Adam under a one-cycle rate, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK_RATE)
    # The last batch is dropped: BatchNorm's statistics of a rump are noise.
    steps = len(data.train) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=epochs * steps)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(data.train), generator=generator)
        for chosen in torch.split(order[: steps * BATCH], BATCH):
            logits = model(augmented(data.train[chosen], generator))
            loss = F.cross_entropy(logits, data.train_labels[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1:2d}/{epochs}  loss {loss.item():.4f}", flush=True)
    return model.eval()


def main() -> None:
    """Train, report held-out accuracy once at the end, and replace the shipped weights.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
        OutputError: the weights cannot be written.
    """
    data = digits_data()
    model = trained(data)
    print(f"held-out accuracy {held_out_accuracy(model, data):.2f} % of {len(data.held_out)} images")
    write_tensors(WEIGHTS, model.state_dict())
    print(f"written to {WEIGHTS}")


if __name__ == "__main__":
    main()
