"""Contestants can be measured one at a time: rows of the others stay in the JSON."""

from __future__ import annotations

from typing import Any

from benchmarks.equal_bytes import Row, joined

META: dict[str, object] = {"calibration images": 64, "evaluation images": 500, "left out": ["MCT: no room"]}


def row(contestant: str, loss: float) -> Row:
    return {"contestant": contestant, "KL": loss}


def test_rows_of_other_contestants_stay_in_the_order_of_all() -> None:
    new = [row("float", 0.0), row("uniform", 0.1)]
    old = [row("float", 9.0), row("default", 0.2), row("uniform", 9.0), row("MCT", 0.3)]
    before: tuple[list[Row], dict[str, Any]] = (old, {**META, "left out": ["uniform: late", "ModelOpt: none"]})
    rows, meta = joined(new, META, before, ["uniform"])
    assert rows == [row("float", 0.0), row("default", 0.2), row("uniform", 0.1), row("MCT", 0.3)]
    assert meta["left out"] == ["MCT: no room", "ModelOpt: none"]


def test_rows_of_other_images_do_not() -> None:
    new, old = [row("float", 0.0), row("uniform", 0.1)], [row("float", 9.0), row("default", 0.2)]
    for other in ({**META, "calibration images": 128}, {**META, "evaluation images": 100}, {}):
        assert joined(new, META, (old, other), ["uniform"]) == (new, META)
