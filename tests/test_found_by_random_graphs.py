"""Networks that `tests/test_random_graphs.py` drew and that did not do as they should; each is what was left of one."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from tests.random_checks import is_what_the_reference_computes, prepared, random_plan, runs_everywhere, simulated
from tests.random_graphs import Recipe, Step

CONV = {"kernel": [1, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, "bias": True}


def conv(source: int, out: int, **options: Any) -> Step:
    return Step("conv", (source,), {**CONV, "mode": "zeros", "out": out, **options})


def pool(source: int, **options: Any) -> Step:
    given = {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1], "ceil": True, "counts": True, "divisor": None}
    return Step("average_pool", (source,), {**given, **options})


FOUND = {
    "a result that is returned twice": Recipe(((3, 4, 4),), (conv(0, 3),), (1, 1), "tuple"),
    "adaptive max pooling": Recipe(
        ((3, 4, 6),), (conv(0, 3), Step("adaptive_pool", (1,), {"size": 3, "kind": "max"}), conv(2, 2)), (3,)
    ),
    "dilated max pooling whose last windows hang over": Recipe(
        ((1, 8, 8),),
        (
            conv(0, 2),
            Step(
                "max_pool", (1,), {"kernel": [2, 2], "stride": [2, 2], "padding": [1, 1], "ceil": True, "dilation": 2}
            ),
            conv(2, 2),
        ),
        (3,),
    ),
    "average pooling whose last windows hang over": Recipe(((1, 6, 6),), (conv(0, 2), pool(1), conv(2, 2)), (3,)),
    "the same without counting the padding": Recipe(((1, 6, 6),), (conv(0, 2), pool(1, counts=False)), (2,)),
    "a layer called on its input and on what is always zero": Recipe(
        ((3, 4, 4),),
        (
            Step("activation", (0,), {"name": "abs"}),
            Step("scalar", (1,), {"way": "neg", "value": 2}),
            Step("relu", (2,)),
            conv(3, 4),
            Step("conv", (0,), {**CONV, "mode": "zeros", "out": 4}, same_as=3),
        ),
        (5, 4),
        "tuple",
    ),
    "the same with a divisor": Recipe(((1, 6, 6),), (conv(0, 2), pool(1, divisor=3)), (2,)),
}


@pytest.mark.parametrize("name", FOUND)
def test_it_runs_everywhere_now(name: str) -> None:
    recipe = FOUND[name]
    program = prepared(recipe, "onnxruntime")
    module = simulated(program, random_plan(program, Random(0)))
    is_what_the_reference_computes(module, recipe)
    runs_everywhere(module, recipe)
