"""The contract every pass is held to by its base class (passes/base.py)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from fxquant.core.errors import PipelineError
from fxquant.core.ir import Program, show
from fxquant.passes import Pass


@dataclass(frozen=True)
class Fact:
    value: int


@dataclass(frozen=True)
class Promise(Pass):
    keep: bool = True
    writes = (Fact,)

    def run(self, program: Program) -> tuple[Program, int]:
        return (program.with_facts(Fact(1)) if self.keep else program), 3


@dataclass(frozen=True)
class Vandal(Pass):
    """Edits its graph as freely as a pass may."""

    reads = (Fact,)

    def run(self, program: Program) -> tuple[Program, int]:
        node = next(n for n in program.module.graph.nodes if n.op == "call_function")
        node.target = torch.neg
        node.args = node.args[:1]
        program.module.register_buffer("left_over", torch.zeros(1))
        return program, 1


def program() -> Program:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.add, (x, x)))
    return Program(GraphModule(nn.Module(), graph))


def test_a_pass_logs_its_settings_and_rewrites() -> None:
    done = Promise()(program())
    assert done[Fact].value == 1
    assert done.log[-1].name == "Promise(keep=True)"
    assert done.log[-1].rewrites == 3
    assert done.log[-1].seconds >= 0.0
    assert [record.name for record in Promise()(done).log] == ["Promise(keep=True)"] * 2


def test_a_promise_that_is_not_kept() -> None:
    with pytest.raises(PipelineError, match="Promise promised to write Fact and did not"):
        Promise(keep=False)(program())


def test_a_fact_that_is_not_there_yet() -> None:
    with pytest.raises(PipelineError, match="Vandal reads Fact, which no pass has written yet"):
        Vandal()(program())


def test_edits_stay_in_the_fork() -> None:
    before = Promise()(program())
    text = show(before.module)
    done = Vandal()(before)
    assert show(before.module) == text
    assert not hasattr(before.module, "left_over")
    assert float(done.module(torch.tensor(2.0))) == -2.0
    assert float(before.module(torch.tensor(2.0))) == 4.0


def test_reads_and_writes_are_no_settings() -> None:
    assert [field.name for field in fields(Promise)] == ["keep"]
    assert [field.name for field in fields(Vandal)] == []
