"""Whatever design the families form: it quantizes or is refused clearly, runs in ONNX Runtime, saves and loads.

In CI always the same few; `python -m tests.family_sweep` goes through thousands.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.family_sweep import holds
from tests.random_families import ANSWERS, LAYERS, LAYOUTS, Design, draw_design, family, shown

FEW = (
    Design("image", (8, 8), 2, True, ("transposed",), ("values", "classes"), "nested", exported_first=True),
    Design("image", (8, 8), 1, False, ("chunk", "expanded"), ("values", "means"), "tuple", free=True),
    Design("image", (6, 9), 1, False, ("volume max", "shuffle"), ("values",), "tensor"),
    Design("sequence", (4,), 1, False, ("lstm", "bilinear"), ("values",), "tensor"),
    Design("tokens", (4,), 1, True, ("gain",), ("values", "flags"), "dict"),
)


@pytest.mark.slow
@pytest.mark.parametrize("design", FEW, ids=lambda design: f"{design.kind} {design.layers[0]}")
def test_every_property_holds_of_the_families(design: Design, tmp_path: Path) -> None:
    assert holds(design, tmp_path) == ""


@pytest.mark.parametrize("seed", range(4))
def test_a_design_is_python_that_makes_it_again(seed: int) -> None:
    design = draw_design(Random(seed))
    again = eval(repr(design), {"Design": Design})
    assert again == design
    with torch.no_grad():
        one, other = (tree_leaves(family(d)(*shown(d, 3))) for d in (design, again))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_row_is_a_network() -> None:
    for kind, rows in LAYERS.items():
        sizes = (8, 8) if kind == "image" else (4,)
        for name in rows:
            design = Design(kind, sizes, 1, False, (name,), tuple(ANSWERS), "tuple")
            with torch.no_grad():
                assert len(family(design)(*shown(design, 2))) == len(ANSWERS), name
    assert {draw_design(Random(seed)).layout for seed in range(200)} == set(LAYOUTS)
