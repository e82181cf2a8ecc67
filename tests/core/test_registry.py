from __future__ import annotations

from collections.abc import Callable

import pytest

from fxquant.core.errors import OptionError, PipelineError
from fxquant.core.registry import Registry


def registry() -> Registry[Callable[[], int]]:
    made: Registry[Callable[[], int]] = Registry("solver")

    @made.register("greedy")
    def greedy() -> int:
        return 1

    assert greedy() == 1, "registration hands back what it decorates"
    return made


def test_look_up_and_iterate() -> None:
    made = registry()
    assert made["greedy"]() == 1
    assert list(made) == ["greedy"]
    assert len(made) == 1


def test_a_miss_suggests_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"unknown solver 'gredy' \(did you mean 'greedy'\?\); known: greedy"):
        registry()["gredy"]
    with pytest.raises(OptionError, match="unknown solver 'xyz'; known: greedy"):
        registry()["xyz"]


def test_asking_whether_does_not_raise() -> None:
    made = registry()
    assert "greedy" in made
    assert "gredy" not in made


def test_duplicates_are_refused() -> None:
    with pytest.raises(PipelineError, match="solver 'greedy' is registered twice"):
        registry_with_duplicate()


def registry_with_duplicate() -> None:
    made = registry()
    made.register("greedy")(lambda: 2)
