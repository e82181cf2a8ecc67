"""Shapes of every zoo network, and a first look at its accuracy where the data folder exists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import data, report_table
from benchmarks import preprocessing as prepare
from benchmarks.zoo import NETWORKS
from benchmarks.zoo.carn_m import carn_m
from benchmarks.zoo.cifar_resnet import CifarResNet
from benchmarks.zoo.imdn import set5_psnr
from benchmarks.zoo.padding import PaddedConv2d, same_3x3
from benchmarks.zoo.weights import loaded
from fxquant.core.errors import FileFormatError, OptionError

needs_data = pytest.mark.skipif(
    data.data_folder() is None, reason="no data folder: set FXQUANT_DATA to run the real networks"
)

OUTPUTS: dict[str, tuple[int, ...]] = dict.fromkeys(("resnet20", "resnet32", "resnet8"), (10,))
OUTPUTS |= dict.fromkeys(("mobilenet_v1", "mobilenet_v2", "efficientnet_lite0"), (1000,))
OUTPUTS |= dict.fromkeys(("deit_tiny", "squeezenet", "resnet18"), (1000,))
OUTPUTS |= {"dscnn": (12,), "imdn": (3, 224, 224)}


def test_every_network_has_a_stated_output() -> None:
    assert set(OUTPUTS) == set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
@needs_data
def test_forward_shape(name: str) -> None:
    network = NETWORKS[name]
    model = network.factory()
    with torch.inference_mode():
        out = model(torch.zeros(1, *network.input_shape))
    assert out.shape == (1, *OUTPUTS[name])
    assert not model.training


# Floors lie four standard errors below the accuracy on the whole set, so only a wrong network falls under.
@pytest.mark.parametrize(
    ("name", "limit", "floor"),
    [
        ("resnet20", 256, 84.0),
        ("resnet32", 128, 83.0),
        ("resnet8", 256, 79.0),
        ("dscnn", 256, 82.0),
        ("mobilenet_v1", 48, 35.0),
        ("mobilenet_v2", 24, 46.0),
        ("efficientnet_lite0", 24, 50.0),
        ("squeezenet", 32, 38.0),
        ("deit_tiny", 24, 46.0),
    ],
)
@needs_data
def test_accuracy_on_a_subset(name: str, limit: int, floor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Decoding all 1300 pictures would take longer than the networks do.
    monkeypatch.setattr(data, "_VAL_IMAGES", limit)
    network = NETWORKS[name]
    images, labels = network.evaluation(limit)
    assert images.shape == (limit, *network.input_shape)
    assert labels.dtype == torch.int64
    assert data.accuracy(network.factory(), images, labels) >= floor


@needs_data
def test_super_resolution_beats_bicubic() -> None:
    # Bicubic reaches 33.64 dB on whole images; the untrained network is far below either.
    assert set5_psnr(NETWORKS["imdn"].factory(), crop=48) > 33.0
    assert set5_psnr(carn_m(), crop=48) > 33.0


@needs_data
def test_mini_images_equal_the_decoded_jpegs() -> None:
    images, labels, calibration = data.imagenet_mini()
    assert images.shape == (256, 3, 224, 224)
    assert calibration.shape == (64, 3, 224, 224)
    # The mini set stores deltas; neighbouring pixels of a picture decoded wrongly jump by half the range.
    assert (images[..., 1:] - images[..., :-1]).abs().mean() < 20.0
    network = NETWORKS["mobilenet_v1"]
    subset = network.preprocessing(images[:48])
    assert data.accuracy(network.factory(), subset, labels[:48]) >= 35.0


@needs_data
def test_calibration_and_evaluation_keywords_are_apart() -> None:
    first, second = (data.keyword_maps(split)[0] for split in ("calibration", "evaluation"))
    assert (len(first), len(second)) == (200, 800)
    assert len(data.keyword_maps("all")[0]) == 1000


@needs_data
def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(FileFormatError, match=r"resnet32.npz does not fit CifarResNet.*layer1\.3\.conv1"):
        loaded(CifarResNet(3), "cifar10_weights/resnet32.npz")


def test_missing_data_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXQUANT_DATA", str(tmp_path))
    with pytest.raises(FileFormatError, match=r"resnet20\.npz is missing; set FXQUANT_DATA"):
        NETWORKS["resnet20"].factory()
    monkeypatch.setenv("FXQUANT_DATA", str(tmp_path / "absent"))
    assert data.data_folder() is None
    with pytest.raises(FileFormatError, match="data folder is missing"):
        data.set5()


def test_unlabelled_network_says_so() -> None:
    with pytest.raises(OptionError, match="resnet18 has no labelled data"):
        NETWORKS["resnet18"].evaluation()


def test_random_resnet18_is_seeded_and_leaves_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = (NETWORKS["resnet18"].factory().state_dict() for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_same_padding_at_stride_2_pads_right_and_bottom_only() -> None:
    conv = same_3x3(1, 1, 2)
    nn.init.ones_(conv.weight)
    nn.init.zeros_(torch.as_tensor(conv.bias))
    out = conv(torch.ones(1, 1, 4, 4))
    assert out.tolist() == [[[[9.0, 6.0], [6.0, 4.0]]]]
    assert PaddedConv2d(1, 1, 3, (1, 1, 1, 1)).padding == (1, 1)


def test_preprocessing_matches_its_formulas() -> None:
    pixel = torch.tensor([255.0, 0.0, 127.5]).view(1, 3, 1, 1)
    expected = [(1.0 - 0.485) / 0.229, -0.456 / 0.224, (0.5 - 0.406) / 0.225]
    torch.testing.assert_close(prepare.imagenet_normalised(pixel).flatten(), torch.tensor(expected))
    assert prepare.minus_one_to_one(pixel).flatten().tolist() == [1.0, -1.0, 0.0]
    assert prepare.caffe_bgr(pixel).flatten().tolist() == [23.5, -117.0, 132.0]


def test_accuracy_counts_over_ragged_batches() -> None:
    logits = torch.eye(5)
    assert data.accuracy(lambda x: x, logits, torch.tensor([0, 1, 2, 0, 0]), batch=2) == pytest.approx(60.0)


def test_interleaved_rotates_and_orders_quartiles() -> None:
    calls: list[str] = []
    callables = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    timings = report_table.interleaved(callables, rounds=4)
    assert calls[4:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert all(0.0 <= t.low <= t.median <= t.high for t in timings.values())
    with pytest.raises(OptionError, match="rounds=1"):
        report_table.interleaved(callables, rounds=1)


def test_write_prints_one_table_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report_table, "RESULTS", tmp_path)
    path = report_table.write("trial", [{"net": "x", "top1": 91.642}, {"net": "longer"}], {"seed": 0})
    assert capsys.readouterr().out.splitlines()[:4] == [
        "net      top1",
        "------  -----",
        "x       91.64",
        "longer      -",
    ]
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["meta"] == {"seed": 0}
    assert {"cpu", "cores", "python", "torch", "onnx", "onnxruntime", "date"} <= set(document["environment"])
    with pytest.raises(OptionError, match="no rows"):
        report_table.write("trial", [], {})
