"""What a backend is: a target, which says what runs in integers, and functions that make a simulated graph run there.

A backend takes the *simulated* graph: ATen ops with `FakeQuantize` modules on the edges and weights that run in
integers (`fxquant.core.ir.fake_quant`). A graph without such modules is the float model and compiles just the same, so
that both are timed in one runtime.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.fx import GraphModule

from fxquant.backends.exact import Requantization, Tracer
from fxquant.core.errors import LoweringError, MissingDependencyError, OptionError
from fxquant.core.facts import SUFFIX, Options, Target, literals, options_of, read_target

Executable = Callable[[tuple[Tensor, ...]], Tensor]
"""Takes the graph's inputs, returns the first tensor of its output as float32."""


class Compile(Protocol):
    """Makes a float or simulated graph run in a runtime."""

    def __call__(self, module: GraphModule, inputs: tuple[Tensor, ...], threads: int | None = None) -> Executable:
        """Return what runs the graph.

        Args:
            module: the graph; it is not changed.
            inputs: example inputs, images along axis 0, which stays dynamic.
            threads: threads the runtime may use, None for its default.

        Raises:
            LoweringError: the graph cannot be expressed there.
            MissingDependencyError: the runtime is not installed.
        """


@dataclass(frozen=True)
class Packages:
    """Python packages that a backend needs and fxquant does not.

    Args:
        modules: names to import them by.
        install: what to give to `pip install`.
    """

    modules: tuple[str, ...] = ()
    install: str = ""

    def check(self, user: str) -> None:
        """Import them all.

        Args:
            user: what needs them, for the message.

        Raises:
            MissingDependencyError: one of them is not installed.
        """
        for module in self.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise MissingDependencyError(
                    f'{user} needs {error.name or module}, which is not installed; pip install "{self.install}"'
                ) from error


@dataclass(frozen=True)
class Export:
    """The file in which a runtime takes a model.

    Args:
        file: its name in the folder of a result, "model." and a suffix, for example "model.onnx".
        write: takes a simulated or float graph, the path, texts to keep in the file (key -> text) and the options
            below by name; returns the bytes written.
        options: the class of those options, which gives `fxquant export` its flags; None without any. If it has a
            field `runtime`, that is what `fxquant export --runtime` may be for this file.
        routes: whether there is a file of the same kind that holds two plans and a router.

    Raises:
        OptionError: a file name of another form.
    """

    file: str
    write: Callable[..., int]
    options: type[Options] | None = None
    routes: bool = False

    @property
    def layouts(self) -> tuple[str, ...]:
        """What `fxquant export --runtime` may be for this file; empty where its options have no `runtime`."""
        known = options_of(self.options or Options)
        return literals(known["runtime"].kind) if "runtime" in known else ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"model\.[\w.]+", self.file) or self.file == "model.pt2":
            raise OptionError(f"a backend exports a file {self.file!r}; call it model.SUFFIX, and not model.pt2")


@dataclass(frozen=True)
class Runtime:
    """One way to run a simulated graph whose integers can be read, so that `fxquant check` can compare them.

    Args:
        trace: takes the simulated graph, the bytes of its file (None: make one where one is needed) and the threads;
            returns what runs images and reports the integers on the quantized edges.
        formulas: takes the simulated graph; returns how this runtime rounds, for the exact reference.
    """

    trace: Callable[[GraphModule, bytes | None, int | None], Tracer]
    formulas: Callable[[GraphModule], Requantization]


@dataclass(frozen=True)
class Backend:
    """What fxquant can do with a target; what a backend does not have is None or empty.

    Args:
        target: what runs in integers.
        compile: makes a graph run, for timing and for accuracy.
        lower: takes a simulated or float graph, returns one that runs on the target's kernels and is called the same.
        export: the file that the runtime reads.
        file_bytes: takes a simulated or float graph and the texts to keep in the file (key -> text), returns the bytes
            of the file that `export` would write of it without options.
        kernels: takes a simulated graph and the path of its file, if one was written; returns layer (module path) ->
            the kernel that the runtime executes, "float" or "float: " and the reason where it computes in float.
        runtimes: name for `fxquant check --against` -> how its integers are read.
        packages: what must be installed.
    """

    target: Target
    compile: Compile
    lower: Callable[[GraphModule], GraphModule] | None = None
    export: Export | None = None
    file_bytes: Callable[[GraphModule, Mapping[str, str]], int] | None = None
    kernels: Callable[[GraphModule, Path | None], dict[str, str]] | None = None
    runtimes: Mapping[str, Runtime] = field(default_factory=dict)
    packages: Packages = field(default_factory=Packages)

    @property
    def suffix(self) -> str:
        """Suffix of the files that its runtimes read, "" where they read none."""
        return "" if self.export is None else Path(self.export.file).suffix

    def check_packages(self) -> None:
        """Do nothing where all packages are installed.

        Raises:
            MissingDependencyError: one of them is missing.
        """
        self.packages.check(f"the {self.target.name} target")


BACKENDS = {
    "reference": "fxquant.backends.reference:reference",
    "simulation": "fxquant.backends.reference:simulation",
    "onnxruntime": "fxquant.backends.onnx.backend:onnx_runtime",
    "fx_int8": "fxquant.backends.int8.fx_backend:fx_int8",
}
"""Target name -> module and function that returns its `Backend`; text, so that importing fxquant needs no runtime."""


def backend(target: str | Path | Target) -> Backend:
    """Return the backend of a target: its own, or the one that its `runs_on` names.

    Args:
        target: a name in `BACKENDS`, the path of a target file (ending in .json), or the target itself.

    Raises:
        OptionError: there is none of that name, or the file holds a value that is not allowed.
        FileFormatError: the file is missing or damaged.
    """
    known = ", ".join(BACKENDS)
    if isinstance(target, str) and not target.endswith(SUFFIX):
        if target not in BACKENDS:
            raise OptionError(f"unknown target {target!r}; known: {known}, or a target file (target.json)")
        return _registered(target)
    described = target if isinstance(target, Target) else read_target(Path(target))
    if described.runner not in BACKENDS:
        raise OptionError(f"target {described.name!r}: runs_on={described.runs_on!r} is unknown; known: {known}")
    found = replace(_registered(described.runner), target=described)
    # The file and the kernels of a proxy are not those of the target it runs.
    return found if described.runner == described.name else replace(found, export=None, file_bytes=None, kernels=None)


def backends() -> dict[str, Backend]:
    """Return every registered backend by the name of its target."""
    return {name: _registered(name) for name in BACKENDS}


def runtimes() -> dict[str, Backend]:
    """Return the name of each runtime that `fxquant check` can compare -> its backend."""
    return {name: found for found in backends().values() for name in found.runtimes}


def is_known_by_name(target: Target) -> bool:
    """Whether a target is a registered one as it is, so that its name says all."""
    return target.runs_on is None and target.name in BACKENDS and target == backend(target.name).target


def lower(target: str | Path | Target, module: GraphModule) -> GraphModule:
    """Return a simulated or float graph on the kernels of a target.

    Raises:
        LoweringError: the target's backend has no such graph, or this one cannot be expressed there.
        OptionError: an unknown target.
    """
    found = backend(target)
    if found.lower is None:
        able = ", ".join(name for name, other in backends().items() if other.lower is not None)
        raise LoweringError(
            f"the target {found.target.name!r} cannot be lowered to a graph; targets that can: {able}; "
            "name one in fxquant.lower(program, target=...)"
        )
    return found.lower(module)


def _registered(name: str) -> Backend:
    module, _, attribute = BACKENDS[name].partition(":")
    made: Backend = getattr(importlib.import_module(module), attribute)()
    return made
