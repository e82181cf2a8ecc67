from __future__ import annotations

from dataclasses import dataclass

import pytest
from torch import nn
from torch.fx import Graph, GraphModule

from fxquant.core.errors import PipelineError
from fxquant.core.ir import Program


@dataclass(frozen=True)
class Colour:
    name: str


@dataclass(frozen=True)
class Weight:
    grams: int


EMPTY = Program(GraphModule(nn.Module(), Graph()))


def test_facts_are_kept_by_type_and_old_programs_stay() -> None:
    red = EMPTY.with_facts(Colour("red"), Weight(3))
    blue = red.with_facts(Colour("blue"))
    assert red[Colour].name == "red"
    assert blue[Colour].name == "blue"
    assert blue[Weight] is red[Weight]
    assert Colour in red
    assert Colour not in EMPTY
    assert red.module is EMPTY.module


def test_a_fact_that_is_missing() -> None:
    with pytest.raises(PipelineError, match="no Colour yet; facts present: none"):
        EMPTY[Colour]
    with pytest.raises(PipelineError, match="no Colour yet; facts present: Weight; run the pass that writes it first"):
        EMPTY.with_facts(Weight(1))[Colour]
