from __future__ import annotations

from fxquant.core.ir import Edge, EdgeGroups


def test_the_group_of_a_producer() -> None:
    groups = EdgeGroups({"a": ("a", "b"), "c": ("c",)}, {"a": (Edge("a", "b", 0),), "c": ()}, {"a": "a", "c": "a"})
    assert groups.group_of("b") == "a"
    assert groups.group_of("c") == "c"
    assert groups.group_of("d") is None
