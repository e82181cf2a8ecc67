"""How good answers are against the float model's, in the units of a budget's limits on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from fxquant.core.errors import CalibrationError
from fxquant.core.run.losses import LOSSES

TOLERANCE = 1e-9
"""A share of images that equals its limit keeps it, however the division rounds."""
NO_LABELS = (
    "a limit on accuracy_drop needs one label for each image: give batches of (images, labels), or limit disagreement, "
    "which bounds the drop without labels"
)


def quality(
    names: Iterable[str], reference: Tensor, output: Tensor, labels: Tensor | None, loss: str
) -> dict[str, float]:
    """Return what was asked of the answers.

    `disagreement = mean(argmax f_S != argmax f)` and `accuracy_drop = mean(argmax f = y) - mean(argmax f_S = y)`; the
    second is at most the first, since an image that turns wrong changes its first answer.

    Args:
        names: of `loss`, `disagreement`, `accuracy_drop`.
        reference: answers of the float model, shape (images, classes) or (images, classes, ...).
        output: answers of the quantized one, of the same shape.
        labels: shape (images,); only `accuracy_drop` and the loss "ce" need them.
        loss: name of the loss.

    Raises:
        CalibrationError: outputs that are no class scores where first answers are asked for, or labels are missing.
    """
    found: dict[str, float] = {}
    for name in names:
        if name == "loss":
            found[name] = float(LOSSES[loss](reference, output, labels).mean())
            continue
        if reference.dim() < 2 or reference.shape[1] < 2:
            raise CalibrationError(
                f"a limit on {name} needs class scores along axis 1; the model answers {tuple(reference.shape)}; "
                "limit the loss"
            )
        was, now = reference.argmax(dim=1), output.argmax(dim=1)
        if name == "disagreement":
            found[name] = float((was != now).double().mean())
            continue
        if labels is None or was.dim() != 1:
            raise CalibrationError(NO_LABELS)
        truth = labels.reshape(-1)
        found[name] = float((was == truth).double().mean() - (now == truth).double().mean())
    return found


def keeps(measured: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether every limit on answers is kept."""
    return all(measured[name] <= limit + TOLERANCE for name, limit in limits.items())
