"""Single substitutions of large networks: wide columns are run on one batch in a few.

Next to its other choices, a layer loses little at 6 or 8 bits, so that the noise of few images is as little, and every
choice takes as many runs. On the images that wide columns see, the narrow ones tell how those differ from all: a wide
column's shifts are scaled by `sqrt(L(all) / L(seen))`, L the loss of its owner's widest narrow column.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fxquant.passes.sensitivity.cell_sweep import Cell, Gathered
from fxquant.passes.sensitivity.columns import Column
from fxquant.passes.sensitivity.pair_choice import suffix_cost
from fxquant.passes.sensitivity.scorer import Batch, Scorer
from fxquant.passes.sensitivity.singles import single_cell

WIDE = 6.0
"""Bits of weights from which on a column is wide, where its owner has a narrow one."""
LARGEST_RATIO = 4.0
"""Of the loss on all images to that on some, beyond which it is noise."""


def thinned(scorer: Scorer) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Return losses, shape (n, images), the gram, shape (n, n), and passes spent; every `wide_every`-th batch is whole.

    Losses are NaN where a column was not run.
    """
    wide = wide_columns(scorer.columns)
    costs = [suffix_cost(scorer, column) for column in scorer.columns]
    share = 1 - sum(costs[k] for k in wide) / max(1e-12, sum(costs))

    def is_whole(batch: Batch) -> bool:
        return batch.index % scorer.wide_every == 0

    found = scorer.by_batch(
        "score single choices",
        f"alone-wide{scorer.wide_every}",
        partial(_cell, left_out=wide, is_whole=is_whole),
        lambda batch: 1.0 if is_whole(batch) else share,
    )
    return *filled(found, wide), found.evaluations


def _cell(scorer: Scorer, batch: Batch, left_out: Collection[int], is_whole: Callable[[Batch], bool]) -> Cell:
    return single_cell(scorer, batch, () if is_whole(batch) else left_out)


def wide_columns(columns: Sequence[Column]) -> dict[int, int]:
    """Return wide column -> the widest narrow column of its owner."""
    narrow: dict[str, int] = {}
    for k, column in enumerate(columns):
        bits = column.weight_bits
        if bits is not None and bits < WIDE:
            known = narrow.get(column.owner)
            if known is None or bits > (columns[known].weight_bits or 0.0):
                narrow[column.owner] = k
    return {
        k: narrow[column.owner]
        for k, column in enumerate(columns)
        if column.weight_bits is not None and column.weight_bits >= WIDE and column.owner in narrow
    }


def filled(found: Gathered, wide: dict[int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return losses, shape (n, images), NaN where a column was not run, and the mean of the gram, shape (n, n).

    Wide columns are scaled as said above; the gram of two columns is the mean over the images of both.

    Args:
        found: cells with `losses`, NaN for columns that were not run, and `gram_sum`, 0 for those.
        wide: from `wide_columns`.
    """
    losses = found.joined("losses")
    ran = ~np.isnan(losses)
    counts = ran.astype(np.float64) @ ran.T.astype(np.float64)
    gram = found.total("gram_sum") / counts
    everywhere, scale = ran.all(axis=0), np.ones(len(losses))
    for k, narrow in wide.items():
        seen, whole = losses[narrow, everywhere].mean(), losses[narrow].mean()
        if seen > 0 and whole > 0:
            scale[k] = np.clip(whole / seen, 1 / LARGEST_RATIO, LARGEST_RATIO)
    losses *= scale[:, None]
    some = np.array([cell["gram_sum"].diagonal() for cell in found.cells if not np.isnan(cell["losses"]).any()])
    few = np.maximum(some.sum(axis=0) / max(1, int(everywhere.sum())), 1e-300)
    # A narrow column that meets a wide one was seen on as few images there.
    ratio = np.where(np.isin(np.arange(len(losses)), list(wide)), scale, gram.diagonal() / few)
    ratio = np.sqrt(np.clip(ratio, 1 / LARGEST_RATIO, LARGEST_RATIO))
    meets = counts < counts.max()
    return losses, np.where(meets, gram * ratio[:, None] * ratio[None, :], gram)
