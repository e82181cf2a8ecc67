"""Float accuracy of every zoo network against the figure the data folder's README states for the same images.

Run `python -m benchmarks.float_accuracy`; about four minutes on two cores. Nothing is random.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import data
from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.zoo import NETWORKS
from benchmarks.zoo.imdn import set5_psnr

# Half a unit of the last digit the README prints, and as much again for another machine's rounding.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Reference:
    """The stated figure (percent, or dB for super-resolution), and the images if not the network's usual ones."""

    figure: float
    images: Callable[[], data.Labelled] | None = None


REFERENCES: dict[str, Reference] = {
    "resnet20": Reference(91.64),
    "resnet32": Reference(92.82),
    "resnet8": Reference(88.00),
    # The figure is over all 1000 maps; the zoo keeps 200 of them apart for calibration.
    "dscnn": Reference(90.1, lambda: data.keyword_maps("all")),
    "mobilenet_v1": Reference(63.54),
    "mobilenet_v2": Reference(80.23),
    "efficientnet_lite0": Reference(82.69),
    "squeezenet": Reference(71.00),
    "deit_tiny": Reference(80.62),
    "imdn": Reference(37.91),
}


def measured(name: str) -> tuple[float, int]:
    """Return the network's own figure and over how many images.

    Raises:
        FileFormatError: weights or images are missing.
    """
    network, reference = NETWORKS[name], REFERENCES[name]
    model = network.factory()
    labelled = reference.images or network.labelled
    if labelled is None:
        return set5_psnr(model), len(data.set5())
    images, labels = labelled()
    return data.accuracy(model, images, labels, preprocessing=network.preprocessing), len(labels)


def main() -> None:
    """Measure every network, print the table and write `results/float_accuracy.json`.

    Raises:
        FileFormatError: the data folder is missing.
        OutputError: the result cannot be written.
    """
    asked(__doc__)
    rows: list[dict[str, object]] = []
    for name, reference in REFERENCES.items():
        start = time.perf_counter()
        figure, images = measured(name)
        rows.append(
            {
                "network": name,
                "metric": "PSNR dB" if name == "imdn" else "top-1 %",
                "images": images,
                "measured": round(figure, 4),
                "stated": reference.figure,
                "agrees": "yes" if abs(figure - reference.figure) <= _TOLERANCE else "NO",
                "seconds": round(time.perf_counter() - start, 2),
            }
        )
    meta = {"seeds": "none: evaluation is deterministic", "tolerance": _TOLERANCE, "precision": "float32 CPU"}
    write("float_accuracy", rows, meta)


if __name__ == "__main__":
    main()
