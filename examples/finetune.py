"""Fine-tune a low-bit mixed plan towards the float model's answers, without labels: a loop to copy.

python examples/finetune.py [folder]: the demo's digits at 2.5 bits on average, 200 steps, about two minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fxquant
from fxquant.core.run import model_outputs
from fxquant.demo import DigitsData, augmented, digits_data, digits_network
from fxquant.qat import distill_step, parameter_groups, reestimate

BITS = 2.5
BATCH = 32


def accuracy(result: fxquant.Result, data: DigitsData) -> float:
    """Return top-1 accuracy in percent on the held-out digits, simulated."""
    answer = model_outputs(result.simulated, (data.held_out,))
    return 100 * float((answer.argmax(dim=1) == data.held_out_labels).double().mean())


def finetune(folder: Path, steps: int = 200, images: int = 128) -> fxquant.Result:
    """Quantize, fine-tune, save and export; print accuracy before and after, and return the trained result."""
    data = digits_data()
    budget = fxquant.Budget(average_bits=BITS)
    result = fxquant.quantize(digits_network(), data.calibration[:images], budget, effort="fast", progress=False)
    print(f"before: {accuracy(result, data):.1f} % at {BITS} bits on average")

    module = result.trainable()  # a copy: training it changes neither the result nor the model
    optimizer = torch.optim.Adam(parameter_groups(module, weight_lr=5e-3, step_lr=1e-3))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randint(0, len(data.train), (BATCH,), generator=generator)
        loss = distill_step(module, result.program.module, augmented(data.train[chosen], generator), optimizer)
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: KL to the float model {loss:.4f}")
    norms = reestimate(module, data.train)
    print(f"{norms} batch norms re-estimated; the others were folded into convolutions" if norms else "no norms left")

    trained = result.with_trained(module)
    print(f"after: {accuracy(trained, data):.1f} %")
    trained.save(folder / "result")
    report = trained.to_onnx(folder / "model.onnx")
    print(f"written to {folder}: {report.bytes} bytes of ONNX, and the result for fxquant.load")
    return trained


if __name__ == "__main__":
    finetune(Path(sys.argv[1] if len(sys.argv) > 1 else "finetuned"))
