from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.capture import capture
from fxquant.core.errors import OptionError
from fxquant.core.facts import Settings
from fxquant.core.ir import Sites
from fxquant.flow import find_sites
from fxquant.passes.cost import SiteLink, site_links
from tests.models import Composed


class Stream(nn.Module):
    """Two residual blocks, a float op between layers, and a layer used twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = (nn.Conv2d(3 if k == 0 else 4, 4, 3, padding=1) for k in range(4))
        self.head, self.twice = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.a(x))
        x = torch.relu(x + self.b(x))
        x = self.c(torch.nn.functional.gelu(x))
        x = self.head(x.mean(dim=(2, 3)))
        answer: Tensor = self.twice(self.twice(x))
        return answer


def places(model: nn.Module) -> dict[tuple[str, str, bool], int]:
    program = find_sites(capture(model.eval(), (torch.rand(1, 3, 6, 6),)), Settings(bits=(8, 32)))
    return {(p.one, p.other, p.joined): p.elements for p in site_links(program.module.graph, program[Sites].sites)}


def test_values_are_followed_through_clips_and_one_join() -> None:
    found = places(Stream())
    assert found["stem", "a", False] == 4 * 6 * 6
    assert found["stem", "a", True] == 4 * 6 * 6
    assert ("a", "b", False) in found
    # Two joins away: what stands on a grid there is up to who reads it in between.
    assert ("stem", "c", False) not in found
    # A float op is the end of the way.
    assert ("b", "c", False) not in found
    assert found["c", "head", False] == 4
    assert found["head", "twice", False] == 4
    assert not any(one == other for one, other, _ in found)


@pytest.mark.parametrize(("one", "other", "elements"), [("a", "a", 1), ("a", "b", 0)])
def test_what_is_no_hand_over(one: str, other: str, elements: int) -> None:
    with pytest.raises(OptionError, match="is no border"):
        SiteLink(one, other, elements)


def test_pools_and_concatenations() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = torch.nn.functional.max_pool2d(torch.relu(net.stem(x)), 2)
        answer: Tensor = net.last(torch.cat([net.left(x), net.right(x)], 1))
        return answer

    branches = {"left": nn.Conv2d(4, 2, 1), "right": nn.Conv2d(4, 2, 1)}
    fire = Composed(forward, stem=nn.Conv2d(3, 4, 3, padding=1), **branches, last=nn.Conv2d(4, 2, 1))
    program = find_sites(capture(fire.eval(), (torch.rand(1, 3, 6, 6),)), Settings(bits=(8, 32)))
    found = {(p.one, p.other): p for p in site_links(program.module.graph, program[Sites].sites)}
    # The quantizer stands before the pool: 144 values are written, 36 arrive.
    assert (found["stem", "left"].elements, found["stem", "left"].pooled) == (36, 108)
    assert found["left", "right"].joined
    assert (found["left", "last"].elements, found["left", "last"].pooled) == (18, 0)
