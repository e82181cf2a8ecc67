"""Quality of a quantized model's answers against the float model's, in the units of a budget's limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fxquant.core.errors import CalibrationError
from fxquant.core.run.confidence_bounds import FEWEST, drop_bound, images_needed, mean_bound, share_bound
from fxquant.core.run.losses import Loss, LossFunction
from fxquant.core.run.task_losses import first_output, loss_of

TOLERANCE = 1e-9
"""A share of images equal to its limit is within the limit, however the division rounds."""
NO_LABELS = (
    "a limit on accuracy_drop needs one label for each image: give batches of (images, labels), or limit disagreement, "
    "which bounds the drop without labels"
)
SPARE = 4
"""Images to judge by, in those without which a limit cannot be shown at all: room for some changed answers."""
SURE, NEARLY_ALL, CORRECT = 0.99, 0.9, 0.98
"""Share of the images at which a network is this sure, and right where labels tell, that makes them look learned."""


@dataclass(frozen=True)
class Measure:
    """One measure of quality over images.

    Args:
        value: its mean over the images.
        bound: the mean over all images like them lies below it, at the confidence asked for.
    """

    value: float
    bound: float


def quality(
    names: Iterable[str],
    reference: Tensor,
    output: Tensor,
    labels: Tensor | None,
    loss: str | Loss | LossFunction,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Measure]:
    """Return the measures of quality with these names.

    `disagreement = mean(argmax f_S != argmax f)` and `accuracy_drop = mean(argmax f = y) - mean(argmax f_S = y)`; the
    second is at most the first, since an image that turns wrong changes its first answer. Bounds are Clopper-Pearson's
    of a share of images, Tango's of a drop of accuracy, and those of a studentized bootstrap for the loss and for
    shares of positions.

    Args:
        names: some of `loss`, `disagreement`, `accuracy_drop`.
        reference: answers of the float model, shape (images, classes) or (images, classes, ...).
        output: answers of the quantized one, of the same shape.
        labels: shape (images,); only `accuracy_drop` and the loss "ce" need them.
        loss: the loss, by its name where the model has one output.
        confidence: of the bounds, above 0, below 1.
        seed: of the bootstrap.

    Raises:
        CalibrationError: the outputs are not class scores, or labels are missing, and a name needs them.
    """
    found, compared = dict[str, Measure](), loss_of(loss)
    for name in names:
        each = _by_image(name, reference, output, labels, compared).double()
        lost, won, count = int((each == 1).sum()), int((each == -1).sum()), len(each)
        if name == "accuracy_drop":
            bound = drop_bound(lost, won, count, confidence)
        elif name == "disagreement" and first_output(compared, reference).dim() == 2:
            bound = share_bound(lost, count, confidence)
        else:
            bound = mean_bound(each.numpy(), confidence, seed)
        found[name] = Measure(float(each.mean()), bound)
    return found


def _by_image(name: str, reference: Tensor, output: Tensor, labels: Tensor | None, loss: Loss) -> Tensor:
    """Return what has the measure as its mean, shape (images,)."""
    if name == "loss":
        return loss(reference, output, labels)
    reference, output = (first_output(loss, answer) for answer in (reference, output))
    if reference.dim() < 2 or reference.shape[1] < 2:
        raise CalibrationError(
            f"a limit on {name} needs class scores along axis 1; the answer has shape {tuple(reference.shape)}; "
            "limit the loss instead"
        )
    was, now = reference.argmax(dim=1), output.argmax(dim=1)
    if name == "disagreement":
        return (was != now).double().reshape(len(was), -1).mean(dim=1)
    if labels is None or was.dim() != 1:
        raise CalibrationError(NO_LABELS)
    truth = labels.reshape(-1)
    return (was == truth).double() - (now == truth).double()


def needed(limits: Mapping[str, float], confidence: float) -> dict[str, int | None]:
    """Return name of each limit -> images without which it cannot be shown to be kept, None where no number can.

    Args:
        limits: limits on answers by name.
        confidence: above 0, below 1.
    """
    unchanged = {
        "disagreement": lambda images: share_bound(0, images, confidence),
        "accuracy_drop": lambda images: drop_bound(0, 0, images, confidence),
    }
    return {
        name: images_needed(limit + TOLERANCE, unchanged[name]) if name in unchanged else FEWEST
        for name, limit in limits.items()
    }


def keeps(bounds: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether the bound of every measure is within its limit."""
    return all(bounds[name] <= limit + TOLERANCE for name, limit in limits.items())


def learned_share(reference: Tensor, labels: Tensor | None) -> float | None:
    """Return the share of images that a network is more than 99 % sure of if they look learned by heart, else None.

    Images that a network was trained on are answered with near certainty, and a quantized network changes few of such
    answers. A network that errs on them, as labels show, has not learned them.

    Args:
        reference: class scores of the float model, shape (images, classes).
        labels: shape (images,), or None.
    """
    if reference.dim() != 2 or reference.shape[1] < 2 or len(reference) < FEWEST:
        return None
    if labels is not None and float((reference.argmax(1) == labels.reshape(-1)).double().mean()) < CORRECT:
        return None
    sure = float((reference.double().softmax(dim=1).amax(dim=1) > SURE).double().mean())
    return sure if sure > NEARLY_ALL else None
