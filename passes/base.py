"""What a pass is: it declares the facts it reads and writes, and the base class holds it to that."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from fxquant.core.errors import PipelineError
from fxquant.core.host import memory_named
from fxquant.core.ir import PassRecord, Program, finish, fork, gradients

LESS_MEMORY = "give fewer or smaller calibration images; what is finished is kept in the workdir"
"""What helps in every pass: what it holds grows with the images, in number and size."""


@dataclass(frozen=True)
class Pass(ABC):
    """A step of the compiler: a program in, a new program out; its fields are its settings.

    A pass may edit the graph it is given freely (it is a fork), and never writes into an existing tensor.
    """

    reads: ClassVar[tuple[type, ...]] = ()
    """Facts that must be present."""
    writes: ClassVar[tuple[type, ...]] = ()
    """Facts that are present afterwards."""

    @abstractmethod
    def run(self, program: Program) -> tuple[Program, int]:
        """Return the new program and how many graph rewrites were made."""

    def __call__(self, program: Program) -> Program:
        """Check the reads, run on a fork, check the graph and the writes, log.

        Raises:
            PipelineError: a fact it reads is absent, or one it promised was not written.
            MemoryLimitError: it needs more memory than there is.
        """
        name = type(self).__name__
        for kind in self.reads:
            if kind not in program:
                raise PipelineError(f"{name} reads {kind.__name__}, which no pass has written yet")
        started = time.perf_counter()
        with memory_named(name, LESS_MEMORY), gradients():
            done, rewrites = self.run(Program(fork(program.module), program.facts, program.log))
        missing = [kind.__name__ for kind in self.writes if kind not in done]
        if missing:
            raise PipelineError(f"{name} promised to write {', '.join(missing)} and did not")
        finish(done.module)
        record = PassRecord(repr(self), rewrites, time.perf_counter() - started)
        return Program(done.module, done.facts, (*program.log, record))
