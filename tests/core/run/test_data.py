from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.core.errors import CalibrationError
from fxquant.core.run import CalibrationSet, collect, data

X = torch.arange(24.0).reshape(4, 3, 2)
Y = torch.tensor([1, 0, 2, 1])
M = torch.ones(4, 1)


@pytest.mark.parametrize(
    "calibration",
    [
        X,
        X.numpy(),
        [X[:3], X[3:]],
        (X[:2], X[2:]),
        (batch for batch in (X[:1], X[1:])),
        [(X[:3],), (X[3:],)],
        [[X[:3], Y[:3]], [X[3:], Y[3:]]],
        [(X, Y, "extra", None)],
        [{"x": X, "unused": "text"}],
        [X.numpy()[:2], X[2:]],
        [X.numpy()[::-1][::-1]],
        CalibrationSet((X,)),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=3),
    ],
)
def test_every_kind_of_batch(calibration: object) -> None:
    images = collect(calibration, ["x"])
    assert len(images.inputs) == 1
    assert torch.equal(images.inputs[0], X)
    assert len(images) == 4


@pytest.mark.parametrize(
    "batch", [(X, Y), [X, Y], (X, Y.numpy()), (X, [1, 0, 2, 1]), {"x": X, "labels": Y}, {"x": X, "y": Y.tolist()}]
)
def test_labels_are_kept_if_they_are_classes(batch: object) -> None:
    labels = collect([batch], ["x"]).labels
    assert labels is not None
    assert torch.equal(labels, Y)


@pytest.mark.parametrize(
    "label",
    [
        {"boxes": torch.zeros(5, 4)},
        torch.zeros(4, 7),
        ["cat"] * 4,
        [[1], [2, 3]],
        None,
        torch.zeros(3),
        "name",
        object(),
    ],
)
def test_labels_of_any_other_kind_are_ignored(label: object) -> None:
    images = collect([(X, label), (X, label)], ["x"])
    assert images.labels is None
    assert len(images) == 8


def test_detection_targets_of_different_counts_are_ignored() -> None:
    assert collect([(X, torch.zeros(5, 4)), (X, torch.zeros(2, 4))], ["x"]).labels is None


def test_two_inputs_by_position_and_by_name() -> None:
    for batch in ((X, M), (X, M, Y), {"mask": M, "image": X}):
        images = collect([batch], ["image", "mask"])
        assert torch.equal(images.inputs[0], X)
        assert torch.equal(images.inputs[1], M)


@pytest.mark.filterwarnings("error")
def test_read_only_and_reversed_arrays() -> None:
    frozen = X.numpy().copy()
    frozen.flags.writeable = False
    assert torch.equal(collect(frozen, ["x"]).inputs[0], X)
    assert torch.equal(collect([X.numpy()[::-1]], ["x"]).inputs[0], X.flip(0))


def test_gradients_do_not_travel_along() -> None:
    assert not collect(X.clone().requires_grad_(), ["x"]).inputs[0].requires_grad


def test_limit_stops_reading() -> None:
    read: list[int] = []

    def batches() -> object:
        for index in range(100):
            read.append(index)
            yield X

    assert len(collect(batches(), ["x"], limit=6)) == 6
    assert read == [0, 1]
    assert len(collect(CalibrationSet((X,)), ["x"], limit=2)) == 2


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "holds no images"),
        (X[:0], "holds no images"),
        ([X[:0], X[:0]], "holds no images"),
        (3, "is a int; give an iterable"),
        (None, "is a NoneType"),
        ({"x": X}, "is a dict; give an iterable"),
        ([{"z": X}], r"lacks inputs \['x'\]; it has \['z'\]"),
        (["path.png"], "holds a str; give tensors"),
        ([None], "holds a NoneType"),
        ([torch.tensor(1.0)], "single number"),
        ([1.0, 2.0], "single number"),
        ([X, torch.zeros(2, 5)], r"do not fit together, image shapes \[\(3, 2\), \(5,\)\]"),
        ([X.numpy().astype(object)], "not numeric"),
        ([()], "has 0 members, the model has 1 inputs"),
        (X * float("nan"), "input 0 holds NaN or infinity, first in image 0"),
        (X / torch.tensor([1.0, 1.0, 0.0, 1.0]).reshape(4, 1, 1), "first in image 2"),
        (torch.tensor([0.0, 1.0, float("inf")]), "first in image 2"),
    ],
)
def test_what_cannot_be_used(calibration: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        collect(calibration, ["x"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: X.to("meta"), "has no values"),
        (lambda: X.to_sparse(), r"is stored sparsely; give \.to_dense\(\)"),
        (lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.quint8), r"is quantized; give \.dequantize\(\)"),
        (lambda: torch.nested.nested_tensor([X[0], X[1]]), "is nested; resize"),
        (lambda: X.bfloat16(), r"are bfloat16, .* give them as float32"),
    ],
)
def test_tensors_of_other_kinds(make: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        collect([make()], ["x"])


def test_inputs_that_differ_in_length() -> None:
    with pytest.raises(CalibrationError, match=r"differ in length: \[1, 4\]"):
        CalibrationSet((X, M[:1]))
    with pytest.raises(CalibrationError, match="differ in length"):
        CalibrationSet((X,), Y[:2])
    with pytest.raises(CalibrationError, match="single number"):
        CalibrationSet((torch.tensor(1.0),))


def test_token_ids_stay_integers() -> None:
    images = collect([torch.tensor([[1, 2], [3, 4]])], ["ids"])
    assert images.inputs[0].dtype == torch.int64


@given(st.integers(1, 30), st.floats(0.01, 0.99), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_split_is_seeded_disjoint_and_whole(count: int, share: float, seed: int) -> None:
    images = CalibrationSet((torch.arange(float(count)),), torch.arange(count))
    score, held = images.split(share, seed)
    again = images.split(share, seed)
    assert torch.equal(score.inputs[0], again[0].inputs[0])
    if count == 1:
        assert score is held is images
        return
    both = torch.cat([score.inputs[0], held.inputs[0]])
    assert torch.equal(both.sort().values, images.inputs[0])
    for part in (score, held):
        assert part.labels is not None
        assert torch.equal(part.inputs[0].long(), part.labels)


@given(st.integers(1, 20), st.integers(1, 25))
@settings(max_examples=30, deadline=None)
def test_batches_join_to_the_set(count: int, size: int) -> None:
    images = CalibrationSet((torch.arange(float(count)),))
    parts: list[Tensor] = [part.inputs[0] for part in images.batches(size)]
    assert torch.equal(torch.cat(parts), images.inputs[0])
    assert all(len(part) == size for part in parts[:-1])
    assert np.array_equal(images.take([0, count - 1]).inputs[0].numpy(), [0, count - 1])


def test_an_endless_loader_ends_where_memory_would(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = 0

    def endless() -> Iterator[torch.Tensor]:
        nonlocal asked
        while True:
            asked += 1
            yield torch.full((4, 10), float(asked))

    monkeypatch.setattr(data, "LARGEST", 1000)
    found = collect(endless(), ["x"])
    # 160 bytes a batch.
    assert len(found) == 24
    assert asked == 7
    assert "calibration ends after 24 images: 0.0 GB of them are held at most" in caplog.text
    # A tensor that the caller holds anyway is taken whole.
    assert len(collect(torch.zeros(1000, 10), ["x"])) == 1000


class Samples(torch.utils.data.Dataset[tuple[object, int]]):
    """Images one by one, each with its label, as torchvision's datasets have them."""

    def __init__(self, samples: list[object]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.samples[index], index % 3


def test_a_dataset_holds_single_images() -> None:
    images = torch.randn(40, 3, 4, 4)
    found = collect(Samples(list(images)), ["x"], limit=35)
    assert torch.equal(found.inputs[0], images[:35])
    assert found.labels is not None
    assert found.labels.tolist() == [k % 3 for k in range(35)]


@pytest.mark.parametrize("samples", [[object(), object()], [torch.zeros(3, 4, 4), torch.zeros(3, 5, 5)]])
def test_a_dataset_without_a_transform_is_told_what_it_lacks(samples: list[object]) -> None:
    with pytest.raises(CalibrationError, match=r"samples make no batch .*give it a transform that returns tensors"):
        collect(Samples(samples), ["x"])
