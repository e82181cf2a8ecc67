"""What does fine-tuning a mixed plan bring back, how fast, and does the deployed file keep it?

`python -m benchmarks.finetune`: CIFAR-10 ResNet-20, W{2,4,8} A8 at average 3 and 2.5 bits, 300 Adam steps of 64
flipped and shifted training images towards the float network's answers (KL, no labels). Accuracy and KL to the float
network on the 1017 test images, before and after, simulated and as the written file runs in ONNX Runtime.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fxquant
from benchmarks import data
from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.zoo import NETWORKS
from fxquant import Budget, Result
from fxquant.backends.onnx import executable
from fxquant.core.run import LOSSES, model_outputs
from fxquant.qat import distill_step, parameter_groups

NETWORK = "resnet20"
SEED = 0
CALIBRATION_IMAGES = 256
BITS = (3.0, 2.5)
STEPS = 300
BATCH = 64
WEIGHT_LR = 3e-3
STEP_LR = 1e-3
PADDING = 4

Row = dict[str, str | float | None]


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return raw images `(N, 3, 32, 32)`, each flipped by chance and shifted by up to 4 pixels, black at the rim."""
    count, side = len(images), images.shape[-1]
    flips = torch.rand(count, generator=generator) < 0.5
    flipped = torch.where(flips[:, None, None, None], images.flip(-1), images)
    padded = F.pad(flipped, (PADDING,) * 4)
    places = torch.randint(0, 2 * PADDING + 1, (count, 2), generator=generator).tolist()
    return torch.stack([padded[k, :, y : y + side, x : x + side] for k, (y, x) in enumerate(places)])


def finetuned(result: Result, steps: int = STEPS) -> tuple[Result, float]:
    """Return the result after fine-tuning, and the seconds that took."""
    images, _ = data.cifar10("train")
    generator = torch.Generator().manual_seed(SEED)
    module, teacher = result.trainable(), result.program.module
    optimizer = torch.optim.Adam(parameter_groups(module, WEIGHT_LR, STEP_LR))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    started = time.perf_counter()
    for step in range(steps):
        chosen = torch.randint(0, len(images), (BATCH,), generator=generator)
        batch = NETWORKS[NETWORK].preprocessing(augmented(images[chosen], generator))
        loss = distill_step(module, teacher, batch, optimizer)
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: KL {loss:.4f}, {time.perf_counter() - started:.0f} s", flush=True)
    seconds = time.perf_counter() - started
    return result.with_trained(module), seconds


def measured(answer: Tensor, reference: Tensor, labels: Tensor, suffix: str) -> Row:
    """Return accuracy (%) and mean KL (nats) of answers against the float ones."""
    accuracy = 100 * float((answer.argmax(dim=1) == labels).double().mean())
    loss = float(LOSSES["kl"](reference, answer, None).mean())
    return {f"accuracy %{suffix}": round(accuracy, 2), f"KL{suffix}": round(loss, 4)}


def row(result: Result, reference: Tensor, images: Tensor, labels: Tensor) -> Row:
    """Return what a result keeps, in simulation and as its ONNX file runs."""
    with tempfile.TemporaryDirectory() as folder:
        report = result.to_onnx(Path(folder) / "model.onnx")
        run = executable(report.path.read_bytes())
    deployed = torch.cat([run((part,)) for part in torch.split(images, BATCH)])
    simulated = model_outputs(result.simulated, (images,))
    same = float((deployed.argmax(dim=1) == simulated.argmax(dim=1)).double().mean())
    found = measured(simulated, reference, labels, "") | measured(deployed, reference, labels, ", ONNX Runtime")
    return found | {"same class %": round(100 * same, 2), "bytes": report.bytes}


def main() -> None:
    """Measure, print the table, write the JSON."""
    asked(__doc__)
    torch.manual_seed(SEED)
    network = NETWORKS[NETWORK]
    images, labels = network.evaluation()
    started = time.perf_counter()
    scored = fxquant.quantize(
        network.factory(),
        network.calibration(CALIBRATION_IMAGES),
        None,
        effort="fast",
        options={"seed": SEED},
        progress=False,
    )
    meta = {"network": NETWORK, "seed": SEED, "calibration images": CALIBRATION_IMAGES, "effort": "fast"}
    meta |= {"steps": STEPS, "batch": BATCH, "weight rate": WEIGHT_LR, "step rate": STEP_LR, "test images": len(labels)}
    meta |= {"training images": len(data.cifar10("train")[0]), "threads": torch.get_num_threads()}
    rows: list[Row] = []
    reference = model_outputs(scored.program.module, (images,))
    rows.append({"average bits": 32.0, "fine-tuned": "float", **measured(reference, reference, labels, "")})
    for bits in BITS:
        result = fxquant.resolve(scored, Budget(average_bits=bits), progress=False)
        used = round(result.allocation.used["average_bits"], 3)
        rows.append({"average bits": used, "fine-tuned": "no", **row(result, reference, images, labels)})
        tuned, seconds = finetuned(result)
        found = row(tuned, reference, images, labels)
        rows.append({"average bits": used, "fine-tuned": "yes", **found, "seconds": round(seconds, 1)})
        # After every plan, for a run that is stopped early.
        write("finetune", rows, meta | {"seconds in all": round(time.perf_counter() - started, 1)})


if __name__ == "__main__":
    main()
