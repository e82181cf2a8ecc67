"""What a task of `benchmarks.tasks` consists of, and how its files are run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.backends.onnx import open_session, session_options
from fxquant.core.errors import OptionError

Answers = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
"""Inputs of a model, in order -> its outputs, in order."""


@dataclass(frozen=True)
class Task:
    """A trained network with the figure that its users care about.

    Args:
        name: of the task.
        model: builds the float network.
        calibration: returns batches, none of which is evaluated on.
        evaluate: (answers, samples or None for all) -> metric -> value on held-out data; dearer figures are not needed
            to compare contestants.
        metric: the key of `evaluate` that limits speak of.
        limits: contestant -> how much worse than float it may be, in units of the metric.
        options: of `fxquant.quantize`, such as the loss.
        average_bits: bits per weight of the mixed and the uniform plans.
        lower_is_better: of the metric, as for perplexity.
        seeds: how often each contestant is made, where few samples cannot tell plans apart; the metrics are means.

    Raises:
        OptionError: a limit of a contestant that is never run.
    """

    name: str
    model: Callable[[], nn.Module]
    calibration: Callable[[], object]
    evaluate: Callable[[Answers, int | None], Mapping[str, float]]
    metric: str
    limits: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    average_bits: tuple[int, ...] = (5, 4)
    lower_is_better: bool = False
    seeds: int = 1

    def __post_init__(self) -> None:
        unknown = sorted(set(self.limits) - set(self.contestants))
        if unknown:
            raise OptionError(f"task {self.name!r} limits {unknown}; its contestants are {self.contestants}")

    @property
    def contestants(self) -> tuple[str, ...]:
        """Names of the quantized files: all layers at W8A8, then mixed and uniform plans of each average."""
        return ("W8A8", *(f"{kind} {bits}" for bits in self.average_bits for kind in ("mixed", "uniform")))

    def lost(self, value: float, floating: float) -> float:
        """Return how much worse a value of the metric is than that of the float file."""
        return value - floating if self.lower_is_better else floating - value


def torch_answers(model: nn.Module) -> Answers:
    """Return the answers of a float model in PyTorch."""

    def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return tuple(pytree.tree_leaves(model(*inputs)))

    return run


def file_answers(path: Path) -> Answers:
    """Return the answers of an ONNX file in ONNX Runtime, on one thread.

    Raises:
        LoweringError: ONNX Runtime refuses the file.
    """
    session = open_session(path, session_options(1))
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        feeds = {name: value.contiguous().numpy() for name, value in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(np.asarray(value)) for value in session.run(None, feeds))

    return run
