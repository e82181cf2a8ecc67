"""Peers at equal bytes: how bytes are counted, what is kept of a peer, and what is said where there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import equal_bytes, equal_bytes_peers
from benchmarks.equal_bytes_contestants import CONTESTANTS
from benchmarks.peer_quantizers import PEERS, Job, Quantized, _budgets, _uniform_widths
from benchmarks.zoo.padding import STRIDE_2_PAD, PaddedConv2d, same_3x3

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def factory() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(same_3x3(8, 8, 2, groups=8), nn.ReLU6(), nn.Conv2d(8, 16, 1))
    return nn.Sequential(same_3x3(3, 8, 1), inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


WEIGHTS = 3 * 8 * 9 + 8 * 9 + 8 * 16 + 16 * 10
JOB = Job(factory, IMAGES, (0.3, 0.12, 0.2, 0.9), 4 * WEIGHTS + 100)


def test_padded_convolutions_become_plain_ones_with_the_same_answers() -> None:
    model = JOB.network()
    assert not [each for each in model.modules() if isinstance(each, PaddedConv2d)]
    assert [each.padding for each in model.modules() if isinstance(each, nn.ZeroPad2d)] == [STRIDE_2_PAD]
    torch.testing.assert_close(model(IMAGES), factory().eval()(IMAGES))


def test_bytes_are_those_of_the_float_file_with_packed_weights_and_float_scales() -> None:
    assert JOB.weights == WEIGHTS
    scales = 4 * (8 + 8 + 16 + 10) + 4 * 5
    assert JOB.file_bytes(JOB.layers(32)) == JOB.float_bytes + scales
    assert JOB.file_bytes(JOB.layers(3)) == 100 + 3 * WEIGHTS // 8 + scales


def test_of_batch_norm_only_a_bias_is_counted() -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))

    job = Job(normed, IMAGES, (0.3,), 4 * (24 + 4 * 8) + 100)
    assert job.file_bytes(job.layers(8)) == 24 + 4 * 8 + 100 + 4 * 8 + 5


def test_room_for_weights_is_what_makes_the_file_as_large_as_asked() -> None:
    room = JOB.weight_room(0.4)
    assert JOB.file_bytes(JOB.layers(0)) + room == pytest.approx(0.4 * JOB.float_bytes)


def test_shares_are_taken_from_the_middle_and_only_where_widths_reach_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert [ratio for ratio, _ in _budgets(JOB)] == [0.2, 0.3]
    assert "0.12:" in capsys.readouterr().err
    assert _uniform_widths(Job(factory, IMAGES, (0.19, 0.2), JOB.float_bytes)) == [2, 3]


def fake(job: Job) -> Quantized:
    for bits in (4, 8):
        yield str(bits), job.network(), job.layers(bits)
    raise ValueError("no third network\nand more")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    def evaluation(count: int) -> tuple[Tensor, Tensor]:
        return IMAGES[:count], torch.zeros(count)

    monkeypatch.setattr(equal_bytes_peers, "NETWORKS", {"tiny": SimpleNamespace(evaluation=evaluation)})
    monkeypatch.setattr(equal_bytes_peers, "PEERS", {"fake": ((), fake)})
    return tmp_path


def test_answers_and_bytes_of_each_network_are_kept_and_why_there_are_not_more(place: Path) -> None:
    equal_bytes_peers.run("fake", "tiny", JOB, 3, place)
    assert sorted(each.name for each in place.iterdir()) == ["4.npz", "8.npz", "left_out", "seconds"]
    size, answer = equal_bytes.answered(place / "4.npz", IMAGES)
    assert size == JOB.file_bytes(JOB.layers(4))
    torch.testing.assert_close(answer, factory().eval()(IMAGES[:3]))
    assert (place / "left_out").read_text() == "ValueError: no third network"
    assert float((place / "seconds").read_text()) >= 0


def test_no_other_network_is_begun_when_the_time_is_spent(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_bytes_peers, "BUDGET_SECONDS", -1.0)
    equal_bytes_peers.run("fake", "tiny", JOB, 3, place)
    assert [each.name for each in place.glob("*.npz")] == ["4.npz"]
    assert (place / "left_out").read_text().startswith("no more files after 4")


def test_a_peer_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(equal_bytes_peers, "PEERS", {"MCT": (("no_such_package",), fake)})
    monkeypatch.setattr(sys, "argv", ["", "MCT", "resnet20", str(tmp_path), "0", "1", "10", "0.1"])
    with pytest.raises(SystemExit, match="has no no_such_package"):
        equal_bytes_peers.main()


def test_without_the_python_of_the_peers_they_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FXQUANT_PEERS_PYTHON", raising=False)
    assert equal_bytes.wrote("resnet20", "ModelOpt", tmp_path, 0) == "FXQUANT_PEERS_PYTHON is not set"
    place = tmp_path / "ModelOpt-0"
    place.mkdir()
    (place / "seconds").write_text("1.0")
    (place / "left_out").write_text("why")
    np.savez(place / "4.npz", answers=np.zeros((2, 3), np.float32), bytes=7)
    assert equal_bytes.wrote("resnet20", "ModelOpt", tmp_path, 0) == "why"


def test_a_failed_start_of_a_peer_is_a_reason_and_not_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "import sys; sys.exit('nothing here')"
    monkeypatch.setenv("FXQUANT_PEERS_PYTHON", sys.executable)
    monkeypatch.setattr(equal_bytes, "command", lambda *_: [sys.executable, "-c", script])
    assert equal_bytes.wrote("resnet20", "ModelOpt", tmp_path, 0) == "nothing here"
    assert not (tmp_path / "ModelOpt-0" / "seconds").exists()
    with pytest.raises(RuntimeError, match="uniform failed on resnet20: nothing here"):
        equal_bytes.wrote("resnet20", "uniform", tmp_path, 0)


def test_contestants_of_ours_and_of_others_have_names_of_their_own() -> None:
    assert not set(PEERS) & set(CONTESTANTS)
