from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fxquant.core.host import Timing, TimingCache, cache_folder

HERE = {"cpu": "A", "torch": "2"}
TIMES = [Timing(1.5, 0.1, 0.0, 0.2), Timing(0.25)]


def test_times_come_back_on_the_machine_they_belong_to(tmp_path: Path) -> None:
    cache = TimingCache(tmp_path, HERE)
    assert cache.get("conv", 2) is None
    cache.put("conv", TIMES)
    assert TimingCache(tmp_path, dict(reversed(HERE.items()))).get("conv", 2) == TIMES
    assert cache.get("linear", 2) is None


@pytest.mark.parametrize("belongs", [{"cpu": "B", "torch": "2"}, {"cpu": "A", "torch": "3"}, {"cpu": "A"}, {}])
def test_another_cpu_or_version_has_to_measure(tmp_path: Path, belongs: dict[str, str]) -> None:
    TimingCache(tmp_path, HERE).put("conv", TIMES)
    assert TimingCache(tmp_path, belongs).get("conv", 2) is None


def test_a_damaged_file_is_reported_and_replaced(tmp_path: Path) -> None:
    cache = TimingCache(tmp_path, HERE)
    cache.put("conv", TIMES)
    (path,) = tmp_path.rglob("*.json")
    path.write_text("{")
    with pytest.warns(UserWarning, match="is damaged"):
        assert cache.get("conv", 2) is None
    cache.put("conv", TIMES)
    assert cache.get("conv", 2) == TIMES


@pytest.mark.parametrize("change", [{"milliseconds": -1.0}, {"milliseconds": float("inf")}, {"hours": 1.0}])
def test_an_impossible_time_is_damage(tmp_path: Path, change: dict[str, float]) -> None:
    cache = TimingCache(tmp_path, HERE)
    cache.put("conv", TIMES)
    (path,) = tmp_path.rglob("*.json")
    document = json.loads(path.read_text())
    document["timings"][0] |= change
    path.write_text(json.dumps(document))
    with pytest.warns(UserWarning, match="is damaged"):
        assert cache.get("conv", 2) is None


def test_a_list_of_another_length_is_damage(tmp_path: Path) -> None:
    cache = TimingCache(tmp_path, HERE)
    cache.put("conv", TIMES)
    with pytest.warns(UserWarning, match="is damaged"):
        assert cache.get("conv", 3) is None


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    cache = TimingCache(tmp_path, HERE)

    def write(turn: int) -> list[Timing] | None:
        cache.put("conv", [Timing(1.0 + turn)] * 50)
        return cache.get("conv", 50)

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(write, range(64)))
    assert all(found is not None and len(set(found)) == 1 for found in seen)
    assert len(list(tmp_path.rglob("*"))) == 3


def test_off_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_CACHE", "off")
    assert cache_folder() is None
    cache = TimingCache(cache_folder(), HERE)
    cache.put("conv", TIMES)
    assert cache.get("conv", 2) is None
    assert not list(tmp_path.iterdir())


def test_where_times_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_CACHE", "/somewhere/else")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/somewhere/else")
    monkeypatch.delenv("FXQUANT_CACHE")
    assert cache_folder() == Path("/caches/fxquant")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fxquant"


def test_a_folder_that_cannot_be_written_loses_no_measurement(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = TimingCache(tmp_path / "file", HERE)
    with pytest.warns(UserWarning, match="times are not kept"):
        cache.put("conv", TIMES)
