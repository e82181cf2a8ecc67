"""Whatever network the ops can form: it captures, quantizes, runs everywhere, keeps its budget, saves and loads.

In CI always the same few networks, of up to 20 calls each. `FXQUANT_NIGHTLY=2000 pytest tests/test_random_graphs.py`
draws that many new ones. A failure prints its recipe; `tests/test_found_by_random_graphs.py` keeps what was found.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from fxquant.core.ir import Sites
from tests.random_checks import (
    TARGETS,
    is_what_the_reference_computes,
    keeps_the_budget_or_refuses,
    prepared,
    random_budget,
    random_plan,
    reads_back_as_it_was,
    runs_everywhere,
    scored,
    simulated,
)
from tests.random_graphs import Recipe, Step, draw_recipe, images, network

# Torch tells this log all about its tracing, and pytest would print it with every failure.
logging.getLogger("torch.__trace").propagate = False

NIGHTLY = int(os.environ.get("FXQUANT_NIGHTLY", "0"))
GRAPHS = NIGHTLY or 4
LONGEST = 20
BUDGETS = 12


@pytest.mark.slow
@settings(
    max_examples=GRAPHS,
    derandomize=not NIGHTLY,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    # Shrinking takes minutes, for each try is an export.
    phases=(Phase.generate, Phase.shrink) if NIGHTLY else (Phase.generate,),
)
@given(st.randoms(use_true_random=False))
def test_every_property_holds_of_random_graphs(chance: Random) -> None:
    recipe = draw_recipe(chance, LONGEST)
    target = TARGETS[chance.randrange(len(TARGETS))]
    note(f"{recipe!r}\nfor {target}")
    program = prepared(recipe, target)
    assert program[Sites].sites
    plan = random_plan(program, chance)
    note(f"at { {name: choice.label for name, choice in plan.choices.items()} }")
    module = simulated(program, plan)
    is_what_the_reference_computes(module, recipe)
    runs_everywhere(module, recipe)
    program = scored(program, recipe.seed)
    for number in range(BUDGETS):
        # A proof takes ten times as long as a good plan.
        budget, solver = random_budget(program, chance), "greedy" if number % 12 else "iqp"
        note(f"within {budget} by {solver}")
        keeps_the_budget_or_refuses(program, budget, solver)
    with tempfile.TemporaryDirectory() as folder:
        reads_back_as_it_was(program, plan, recipe, Path(folder))


@pytest.mark.parametrize("seed", range(4))
def test_a_recipe_is_python_that_makes_it_again(seed: int) -> None:
    recipe = draw_recipe(Random(seed))
    again = eval(repr(recipe), {"Recipe": Recipe, "Step": Step})
    assert again == recipe
    shown = images(recipe, 4)
    with torch.no_grad():
        one, other = (tree_leaves(network(r)(*shown)) for r in (recipe, again))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
