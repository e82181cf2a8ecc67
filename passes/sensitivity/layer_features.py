"""What the layers of the float network answer, and scores that give every layer one price for a bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from fxquant.core.ir import FLOAT_BITS, Sites, images_axis, tensor_at
from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity.columns import Column
from fxquant.passes.sensitivity.registry import Estimate
from fxquant.passes.sensitivity.scorer import Scorer


def layer_features(
    scorer: Scorer, images: CalibrationSet, summary: Callable[[Tensor, int], Tensor]
) -> dict[str, list[Tensor]]:
    """Run the float network once on all images together, and return what each site's ops answer, summarized.

    Only values that are still to be read are held, so that the memory is that of a plain run.

    Args:
        scorer: the network.
        images: the images.
        summary: makes a summary of an answer of shape (images, ...) and of the axis that counts its channels, from the
            end. Answers without an axis of images are left out.

    Returns:
        Site -> a summary for each op that reads its weight, sites in the order of the program.
    """
    replay, found = scorer.replay, dict[str, list[Tensor]]()
    site_of: dict[Node, str] = {}
    for site in scorer.program[Sites].sites:
        found[site.name] = []
        site_of |= {answer_of(replay.by_name[name]): site.name for name in site.readers}
    values: dict[Node, Any] = dict(replay.given(images.inputs))

    def summarize(node: Node) -> None:
        axis = images_axis(node) if node in site_of else None
        if axis is not None:
            weight = tensor_at(scorer.program.module, scorer.program[Sites].by_name(site_of[node]).weight)
            moved = values[node].movedim(axis, 0)
            # In an axis of images times windows or heads, images vary slowest.
            split = moved.reshape(len(images), -1, *moved.shape[1:])
            # Channels precede the axes that a filter slides along.
            found[site_of[node]].append(summary(split.double(), 1 - weight.dim()))

    with torch.no_grad():
        replay.run(replay.steps, values, None, scorer.off, lambda _: False, summarize, alone=site_of)
    return found


def answer_of(op: Node) -> Node:
    """Return the node that holds the tensor an op answers: itself, or the first member of its answer (an LSTM's)."""
    if isinstance(op.meta["val"], Tensor):
        return op
    return next(user for user in op.users if user.args[1] == 0)


def priced_bits(
    scorer: Scorer, prices: NDArray[np.float64], stderr: NDArray[np.float64], evaluations: float
) -> Estimate:
    """Return `values = diag(price x bits left out)`, which orders plans as the linear program `max sum price x bits`.

    A layer's bits left out are `32 - W`, and `32 - A` of the values it reads.

    Args:
        scorer: has the columns.
        prices: price of a bit of each site, shape (sites,), at least 0.
        stderr: their standard errors, NaN where they are not known.
        evaluations: whole-network passes over one image spent.
    """
    bits = np.array([_left_out(scorer, column) for column in scorer.columns])
    variance = bits**2 @ np.nan_to_num(stderr) ** 2
    unknown = (bits != 0) @ np.isnan(stderr)
    return Estimate(np.diag(bits @ prices), np.diag(np.where(unknown, np.nan, np.sqrt(variance))), evaluations)


def _left_out(scorer: Scorer, column: Column) -> NDArray[np.float64]:
    """Return the bits that a column leaves out at each site, shape (sites,)."""
    weight = 0.0 if column.weight_bits is None else FLOAT_BITS - column.weight_bits
    value = 0.0 if column.activation_bits is None else FLOAT_BITS - column.activation_bits
    sites = scorer.program[Sites].sites
    if column.site is not None:
        return np.array([weight + value if site.name == column.site else 0.0 for site in sites])
    # The sites that read a tie carry an equal part of its column each.
    return np.array([value if not site.stored and column.owner == f"tie {site.input_tie}" else 0.0 for site in sites])


def jackknife_error(without: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard error `sqrt((n - 1) / n sum_k (t_k - mean t)^2)` of a statistic (Quenouille, Tukey).

    Args:
        without: t, shape (..., n): the statistic of all images but the k-th.
    """
    count = without.shape[-1]
    squares = np.square(without - without.mean(axis=-1, keepdims=True)).sum(axis=-1)
    return np.asarray(np.sqrt((count - 1) / count * squares), dtype=np.float64)
