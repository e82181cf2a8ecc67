"""The errors that fxquant raises on purpose, in one tree.

    FxquantError                 base; carries `exit_code` for the command line
    ├── InputError        (2)    something given cannot be used
    │   ├── CaptureError         the model does not export to an ATen graph
    │   ├── CalibrationError     calibration data are empty, ragged, non-finite or of the wrong shape
    │   ├── OptionError          an option has an unknown name or a value out of range
    │   └── FileFormatError      a file is missing, truncated, of another version or not what it claims to be
    ├── InfeasibleBudgetError (3) no plan satisfies the limits; names the reachable range
    ├── ParityError       (4)    a runtime does not compute what the plan says; names the edge
    └── FailureError      (1)    the work itself failed
        ├── PipelineError        a pass was run before the facts it reads exist
        ├── LoweringError        a backend cannot express the graph
        ├── SolverError          the solver ended without an answer
        ├── OutputError          a result cannot be written
        │   └── BusyFolderError  another run is writing to the folder
        ├── MemoryLimitError     a stage needs more memory than there is
        ├── WorkerError          another process of a sharded run died, hangs, or works on something else
        └── MissingDependencyError  an optional package is not installed

Each message says what failed, with which value, what is allowed and what to do.
"""

from __future__ import annotations

from typing import ClassVar


class FxquantError(Exception):
    """Base of all errors raised on purpose."""

    exit_code: ClassVar[int] = 1


class InputError(FxquantError):
    """Something given cannot be used."""

    exit_code: ClassVar[int] = 2


class CaptureError(InputError):
    """The model does not export to an ATen graph."""


class CalibrationError(InputError):
    """Calibration data are empty, ragged, non-finite or of the wrong shape."""


class OptionError(InputError):
    """An option has an unknown name or a value out of range."""


class FileFormatError(InputError):
    """A file is missing, truncated, of another version or not what it claims to be."""


class InfeasibleBudgetError(FxquantError):
    """No plan satisfies the limits."""

    exit_code: ClassVar[int] = 3


class ParityError(FxquantError):
    """A runtime does not compute what the plan says."""

    exit_code: ClassVar[int] = 4


class FailureError(FxquantError):
    """The work itself failed."""


class PipelineError(FailureError):
    """A pass was run before the facts it reads exist."""


class LoweringError(FailureError):
    """A backend cannot express the graph."""


class SolverError(FailureError):
    """The solver ended without an answer."""


class OutputError(FailureError):
    """A result cannot be written."""


class BusyFolderError(OutputError):
    """Another run is writing to the folder."""


class MemoryLimitError(FailureError):
    """A stage needs more memory than there is."""


class WorkerError(FailureError):
    """Another process of a sharded run died, hangs, or works on something else."""


class MissingDependencyError(FailureError):
    """An optional package is not installed."""


def first_line(error: BaseException, letters: int = 200) -> str:
    """Return the first line of an error's text that is not blank, cut off after some letters; its class without one."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:letters]
