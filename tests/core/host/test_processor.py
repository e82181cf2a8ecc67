from __future__ import annotations

from pathlib import Path

import pytest

from fxquant.core.host import cpu_model, int8_instructions, machine
from fxquant.core.host import processor as module

LISTING = "processor : 0\nmodel name : Chip {model}\nflags : fpu {flags}\n\nprocessor : 1\nmodel name : other\n"


def written(folder: Path, model: str = "A", flags: str = "vnni avx") -> Path:
    path = folder / "cpuinfo"
    path.write_text(LISTING.format(model=model, flags=flags))
    return path


def test_the_processor_its_flags_and_versions_are_distinguished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LISTING", written(tmp_path))
    first = machine(("torch", "no-such-package"))
    assert first["cpu"] == "Chip A"
    assert int(first["cores"]) >= 1
    assert "torch" in first
    assert "no-such-package" not in first
    written(tmp_path, flags="avx vnni")
    assert machine(("torch",)) == first
    written(tmp_path, flags="avx")
    assert machine(("torch",))["flags"] != first["flags"]
    written(tmp_path, model="B")
    assert machine(("torch",))["cpu"] == "Chip B"


def test_a_machine_without_a_listing_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LISTING", tmp_path / "nothing")
    assert machine(())["cpu"]


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("avx2 avx512_vnni amx_int8", "AMX"),
        ("avx512_vnni avx2", "AVX512 VNNI"),
        ("fpu avx2", ""),
        ("avx_vnni", "AVX VNNI"),
    ],
)
def test_the_fastest_int8_instructions_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, found: str
) -> None:
    monkeypatch.setattr(module, "LISTING", written(tmp_path, flags=flags))
    assert int8_instructions() == found
    assert cpu_model() == "Chip A"


def test_where_nothing_is_listed_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LISTING", tmp_path / "nothing")
    assert int8_instructions() is None
    (tmp_path / "arm").write_text("processor : 0\nFeatures : fp asimddp\n")
    monkeypatch.setattr(module, "LISTING", tmp_path / "arm")
    assert int8_instructions() == "ARM dot products"
