"""Calibrated ranges: a histogram of each value that may carry a quantizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fxquant.core.errors import CalibrationError, FileFormatError
from fxquant.core.ir import Grid, QuantSpec, activation_spec
from fxquant.core.storage import checked_document, parse_json, read_arrays, write_arrays

BINS = 2048
FORMAT_VERSION = 1
SEARCH_STEPS = 64
SEARCH_LOWEST = 0.2
GAUSSIAN_STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.05687, 8: 0.03076}
"""Bits -> the step, in standard deviations, whose `2^bits` evenly spaced levels round a Gaussian with the least squared
error (Max, 1960)."""


@dataclass(frozen=True)
class Histogram:
    """Distribution of one value: `counts[k]` elements in `[low + k * width, low + (k + 1) * width)`.

    Args:
        low: lower end of the first bin.
        width: width of a bin, above 0.
        counts: shape (2048,), float64.
        minimum: smallest element seen, or the observer's estimate of it.
        maximum: largest element seen, or the observer's estimate of it.

    Raises:
        CalibrationError: an end or a count is not finite, or nothing was counted.
    """

    low: float
    width: float
    counts: NDArray[np.float64]
    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        if not np.isfinite([self.low, self.width, self.minimum, self.maximum]).all() or self.width <= 0:
            raise CalibrationError(f"histogram ends are not finite: low={self.low}, width={self.width}")
        if not np.isfinite(self.counts).all():
            raise CalibrationError("histogram counts are not finite")
        if self.counts.shape != (BINS,) or self.counts.sum() <= 0:
            raise CalibrationError("histogram is empty; run calibration images through the prepared graph first")

    @property
    def centres(self) -> NDArray[np.float64]:
        """Middle of each bin, shape (2048,)."""
        return self.low + (np.arange(BINS, dtype=np.float64) + 0.5) * self.width

    def rebinned(self, low: float, width: float) -> NDArray[np.float64]:
        """Return the counts on another grid of 2048 bins that covers this one."""
        index = np.clip(((self.centres - low) / width).astype(np.int64), 0, BINS - 1)
        return np.bincount(index, weights=self.counts, minlength=BINS).astype(np.float64)


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """Return one histogram over the union, that of a group of edges with one scale."""
    members = list(histograms)
    if len(members) == 1:
        return members[0]
    low = min(h.low for h in members)
    high = max(h.low + BINS * h.width for h in members)
    width = (high - low) / BINS
    # Each member has the same weight, or a large feature map would outweigh a small one.
    counts = sum((h.rebinned(low, width) / h.counts.sum() for h in members), np.zeros(BINS))
    return Histogram(low, width, counts, min(h.minimum for h in members), max(h.maximum for h in members))


def clip_error(histogram: Histogram, low: float, high: float, spec: QuantSpec) -> float:
    """Return the expected squared error of quantizing the histogram's bin centres on the grid of `[low, high]`."""
    grid = Grid.covering(torch.tensor(low), torch.tensor(high), spec)
    # In float64, as the bins are.
    scale, zero_point = float(grid.scale), int(grid.zero_point)
    centres = histogram.centres
    q = np.clip(np.round(centres / scale) + zero_point, spec.qmin, spec.qmax)
    return float((histogram.counts * np.square((q - zero_point) * scale - centres)).sum())


def mse_range(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """Return the clip of least squared error: `argmin_r error(r * minimum, r * maximum)`, r in [0.2, 1]."""
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    ratios = np.linspace(1.0, SEARCH_LOWEST, SEARCH_STEPS)
    errors = [clip_error(histogram, low * r, high * r, spec) for r in ratios]
    best = float(ratios[int(np.argmin(errors))])
    return low * best, high * best


def gaussian_range(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """Return `mean -+ step (2^bits - 1) / 2 deviation`, the step of `GAUSSIAN_STEPS`, within what was seen.

    DAQ's quantizer (Hong et al., arXiv 2012.11230) with one range for all channels: per-channel ranges of activations
    do not pass through an integer product over channels.
    """
    counts, centres = histogram.counts, histogram.centres
    mean = float((counts * centres).sum() / counts.sum())
    deviation = float(np.sqrt((counts * np.square(centres - mean)).sum() / counts.sum()))
    reach = GAUSSIAN_STEPS[spec.bits] * (spec.qmax - spec.qmin) / 2 * deviation
    return max(histogram.minimum, mean - reach), min(histogram.maximum, mean + reach)


def full_range(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """Return minimum and maximum as they are."""
    del spec
    return histogram.minimum, histogram.maximum


CLIPS: dict[str, Callable[[Histogram, QuantSpec], tuple[float, float]]] = {
    "mse": mse_range,
    "full": full_range,
    "gaussian": gaussian_range,
}
"""Name of a way of clipping -> (what was seen, spec of a grid) -> the range that the grid covers."""


@dataclass(frozen=True)
class Ranges:
    """Calibrated distribution of every value that may carry a quantizer.

    Args:
        histograms: producer node name -> distribution of its values.
        clip: "mse" searches the clip of least squared error per grid, "full" uses minimum and maximum as they are,
            "gaussian" takes what suits a Gaussian of the same mean and deviation.
        factors: producers whose values only scale others, as a sigmoid's do: their ends count most, and no clip of
            least squared error of their own suits them; minimum and maximum are used as they are.

    Raises:
        CalibrationError: another clip.
    """

    histograms: dict[str, Histogram]
    clip: str = "mse"
    factors: frozenset[str] = frozenset()
    _memo: dict[tuple[tuple[str, ...], int], Grid] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.clip not in CLIPS:
            raise CalibrationError(f"clip {self.clip!r} of ranges is unknown; known: {', '.join(CLIPS)}")

    def grid(self, producers: Iterable[str], bits: int) -> Grid:
        """Return the activation grid, one scale, of values that share it.

        Raises:
            CalibrationError: one of the values was never observed.
        """
        names = tuple(producers)
        if (names, bits) not in self._memo:
            self._memo[names, bits] = self._search(names, activation_spec(bits))
        return self._memo[names, bits]

    def _search(self, names: tuple[str, ...], spec: QuantSpec) -> Grid:
        missing = [name for name in names if name not in self.histograms]
        if missing:
            raise CalibrationError(f"values {missing} were never observed; calibrate after prepare, on the same graph")
        histogram = merged(self.histograms[name] for name in names)
        low, high = CLIPS["full" if self.factors.issuperset(names) else self.clip](histogram, spec)
        return Grid.covering(torch.tensor(low), torch.tensor(high), spec)

    def save(self, path: Path) -> None:
        """Write the ranges as npz.

        Raises:
            OutputError: the folder cannot be written.
        """
        names = list(self.histograms)
        rows = [self.histograms[name] for name in names]
        header: dict[str, Any] = {"kind": "ranges", "version": FORMAT_VERSION, "names": names, "clip": self.clip}
        header["factors"] = sorted(self.factors)
        write_arrays(
            path,
            {
                "header": np.array(json.dumps(header)),
                "ends": np.array([[h.low, h.width, h.minimum, h.maximum] for h in rows]).reshape(-1, 4),
                "counts": np.array([h.counts for h in rows]).reshape(-1, BINS),
            },
        )

    @staticmethod
    def load(path: Path) -> Ranges:
        """Read what `save` wrote.

        Raises:
            FileFormatError: missing, truncated, of another version or inconsistent.
        """
        arrays = read_arrays(path)
        try:
            header: dict[str, Any] = checked_document(
                parse_json(str(arrays["header"])), "ranges", FORMAT_VERSION, str(path)
            )
            histograms = {
                str(name): Histogram(float(e[0]), float(e[1]), counts, float(e[2]), float(e[3]))
                for name, e, counts in zip(header["names"], arrays["ends"], arrays["counts"], strict=True)
            }
            return Ranges(histograms, str(header["clip"]), frozenset(header.get("factors", ())))
        except (KeyError, ValueError, TypeError, IndexError, CalibrationError) as error:
            raise FileFormatError(f"{path} is not an intact ranges file ({error}); calibrate again") from error
