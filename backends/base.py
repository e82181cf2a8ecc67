"""What a backend is: a target that says what runs in integers, and a way to make a simulated graph run there.

A backend takes the *simulated* graph: ATen ops with `FakeQuantize` modules on the edges and weights that run in
integers (`fxquant.core.ir.fake_quant`). A graph without such modules is the float model and compiles just the same, so
that both are timed in one runtime.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.fx import GraphModule

from fxquant.core.errors import OptionError
from fxquant.core.facts import SUFFIX, Target

Executable = Callable[[tuple[Tensor, ...]], Tensor]
"""Takes the graph's inputs, returns the first tensor of its output as float32."""


class Backend(Protocol):
    """One runtime."""

    @property
    def target(self) -> Target:
        """What runs in integers here."""

    def compile(self, module: GraphModule, inputs: tuple[Tensor, ...], threads: int | None = None) -> Executable:
        """Make a float or simulated graph run in this runtime.

        Args:
            module: the graph; it is not changed.
            inputs: example inputs, images along axis 0, which stays dynamic.
            threads: threads the runtime may use, None for its default.

        Raises:
            LoweringError: the graph cannot be expressed here.
            MissingDependencyError: the runtime is not installed.
        """


BACKENDS = {
    "reference": "fxquant.backends.reference:ReferenceBackend",
    "simulation": "fxquant.backends.reference:SimulationBackend",
    "onnxruntime": "fxquant.backends.onnx.backend:OnnxRuntimeBackend",
    "fx_int8": "fxquant.backends.int8.backend:FxInt8Backend",
}
"""Backend name -> where it is, as text, so that importing fxquant needs no runtime."""
DESCRIBED = "fxquant.backends.described_target:DescribedBackend"
"""What serves the targets that files describe."""


def backend(name: str) -> Backend:
    """Return the backend of a target name, or of a file that describes one.

    Raises:
        OptionError: there is none of that name, or the file says what is not allowed.
        FileFormatError: the file is missing or damaged.
    """
    if name.endswith(SUFFIX):
        return _made(DESCRIBED, Path(name))
    if name not in BACKENDS:
        raise OptionError(f"unknown target {name!r}; known: {', '.join(BACKENDS)}, or a target file (target.json)")
    return _made(BACKENDS[name])


def _made(place: str, *arguments: object) -> Backend:
    module, _, attribute = place.partition(":")
    made: Backend = getattr(importlib.import_module(module), attribute)(*arguments)
    return made
