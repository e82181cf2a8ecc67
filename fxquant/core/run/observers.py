"""Observers: graph nodes that return their input unchanged and keep a histogram of it."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fxquant.core.errors import CalibrationError
from fxquant.core.facts import BINS, Histogram
from fxquant.core.registry import Registry

DENSE_LIMIT = 1 << 18
"""Most elements of one batch that are all counted; of more, a sample is."""

LARGEST = 1e37
"""Largest magnitude that the histogram's own arithmetic in float32 can take."""


class Observer(nn.Module):
    """Counts its input in a histogram, batch by batch, and stores no activation.

    The histogram starts on the first batch's range. When a later batch falls outside, the bin width doubles until it
    fits, and old counts move to the new bins: their sum stays.

    Raises:
        CalibrationError: a value is NaN or infinite; the message names the observed node.
    """

    clip: ClassVar[str] = "full"

    def __init__(self, producer: str) -> None:
        super().__init__()
        self.producer = producer
        self.minimum = 0.0
        self.maximum = 0.0
        self._low = 0.0
        self._width = 0.0
        self._counts = np.zeros(BINS)
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        """Count x, of any shape, and return it unchanged."""
        if x.numel() == 0:
            return x
        flat = x.detach().float()
        if flat.dim() == 4 and flat.is_contiguous(memory_format=torch.channels_last):
            # In the order of its memory, to be read as one row.
            flat = flat.permute(0, 2, 3, 1)
        low, high = (float(v) for v in torch.aminmax(flat))
        if not max(abs(low), abs(high)) <= LARGEST:
            raise CalibrationError(
                f"value {self.producer!r} is not finite during calibration, or beyond {LARGEST:g} ({low}..{high}); "
                "check the images and the model's weights"
            )
        self._cover(low, high)
        # Of a large map every n-th element is counted, n odd, so that rows and channels of even length are all seen.
        stride = 1 if flat.numel() <= DENSE_LIMIT else flat.numel() // DENSE_LIMIT | 1
        top = self._low + BINS * self._width
        # Rounding can leave the ends short of the extremes, and histc drops what lies outside.
        seen = flat.flatten()[::stride].clamp(self._low, top)
        counts = torch.histc(seen, bins=BINS, min=self._low, max=top)
        self._counts += counts.double().cpu().numpy() * stride
        self._track(low, high)
        self.batches += 1
        return x

    def _cover(self, low: float, high: float) -> None:
        """Widen the grid to hold `[low, high]`."""
        low, high = min(low, 0.0), max(high, 0.0)
        if self._width == 0.0:
            # A constant value still needs bins of some width.
            span = max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-12)
            self._low, self._width = low, span / BINS
            return
        old_low, old_high = self._low, self._low + BINS * self._width
        if low >= old_low and high <= old_high:
            return
        new_low, new_high = min(low, old_low), max(high, old_high)
        width = self._width
        while new_low + BINS * width < new_high:
            width *= 2.0
        centres = old_low + (np.arange(BINS) + 0.5) * self._width
        index = np.clip(((centres - new_low) / width).astype(np.int64), 0, BINS - 1)
        self._counts = np.bincount(index, weights=self._counts, minlength=BINS).astype(np.float64)
        self._low, self._width = new_low, width

    def _track(self, low: float, high: float) -> None:
        """Update the observer's estimate of the range by one batch's extremes."""
        if self.batches == 0:
            self.minimum, self.maximum = low, high
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)

    def histogram(self) -> Histogram:
        """Return the histogram of all values so far.

        Raises:
            CalibrationError: there were none.
        """
        if self.batches == 0:
            raise CalibrationError(
                f"value {self.producer!r} was never observed; run calibration images through the graph with observers"
            )
        return Histogram(self._low, self._width, self._counts.copy(), self.minimum, self.maximum)


OBSERVERS: Registry[type[Observer]] = Registry("observer")
"""Name -> observer class, constructed with the name of the observed value."""


@OBSERVERS.register("minmax")
class MinMaxObserver(Observer):
    """Uses the smallest and the largest element."""


@OBSERVERS.register("mse")
class MseObserver(Observer):
    """Clips where the squared error over the histogram is least."""

    clip = "mse"


@OBSERVERS.register("gaussian")
class GaussianObserver(Observer):
    """Clips as suits a Gaussian of the same mean and deviation: no search, and robust where few values were seen."""

    clip = "gaussian"


@OBSERVERS.register("moving_average")
class MovingAverageObserver(Observer):
    """Averages the extremes of batches: `m <- 0.9 m + 0.1 batch`."""

    momentum: ClassVar[float] = 0.1

    def _track(self, low: float, high: float) -> None:
        if self.batches == 0:
            self.minimum, self.maximum = low, high
        self.minimum += self.momentum * (low - self.minimum)
        self.maximum += self.momentum * (high - self.maximum)


@OBSERVERS.register("percentile")
class PercentileObserver(Observer):
    """Clips 0.01 % of the elements at each end."""

    tail: ClassVar[float] = 1e-4

    def histogram(self) -> Histogram:
        """Return the histogram with its range clipped at the percentiles."""
        seen = super().histogram()
        share = np.cumsum(seen.counts) / seen.counts.sum()
        first = int(np.searchsorted(share, self.tail))
        last = int(np.searchsorted(share, 1.0 - self.tail))
        low, high = seen.low + first * seen.width, seen.low + (last + 1) * seen.width
        return Histogram(seen.low, seen.width, seen.counts, max(low, seen.minimum), min(high, seen.maximum))
