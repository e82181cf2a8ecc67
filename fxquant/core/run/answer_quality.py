"""Quality of a quantized model's answers against the float model's, in the units of a budget's limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from fxquant.core.errors import CalibrationError
from fxquant.core.run.losses import LOSSES

TOLERANCE = 1e-9
"""A share of images equal to its limit is within the limit, however the division rounds."""
NO_LABELS = (
    "a limit on accuracy_drop needs one label for each image: give batches of (images, labels), or limit disagreement, "
    "which bounds the drop without labels"
)


def quality(
    names: Iterable[str], reference: Tensor, output: Tensor, labels: Tensor | None, loss: str
) -> dict[str, float]:
    """Return the measures of quality with these names.

    `disagreement = mean(argmax f_S != argmax f)` and `accuracy_drop = mean(argmax f = y) - mean(argmax f_S = y)`; the
    second is at most the first, since an image that turns wrong changes its first answer.

    Args:
        names: some of `loss`, `disagreement`, `accuracy_drop`.
        reference: answers of the float model, shape (images, classes) or (images, classes, ...).
        output: answers of the quantized one, of the same shape.
        labels: shape (images,); only `accuracy_drop` and the loss "ce" need them.
        loss: name of the loss.

    Raises:
        CalibrationError: the outputs are not class scores, or labels are missing, and a name needs them.
    """
    found: dict[str, float] = {}
    for name in names:
        if name == "loss":
            found[name] = float(LOSSES[loss](reference, output, labels).mean())
            continue
        if reference.dim() < 2 or reference.shape[1] < 2:
            raise CalibrationError(
                f"a limit on {name} needs class scores along axis 1; the answer has shape {tuple(reference.shape)}; "
                "limit the loss instead"
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
    """Whether every measure is within its limit."""
    return all(measured[name] <= limit + TOLERANCE for name, limit in limits.items())
