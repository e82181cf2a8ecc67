from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

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
    "labels",
    [
        [label] * 2
        for label in ({"boxes": X}, torch.zeros(4, 7), ["cat"] * 4, [[1], [2, 3]], None, Y[:3], "name", object())
    ]
    # Of a detector: as many rows as there are boxes.
    + [[torch.zeros(5, 4), torch.zeros(2, 4)]],
)
def test_labels_of_any_other_kind_are_ignored(labels: list[object]) -> None:
    images = collect([(X, label) for label in labels], ["x"])
    assert images.labels is None
    assert len(images) == 8


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


def test_gradients_do_not_travel_along_and_token_ids_stay_integers() -> None:
    assert not collect(X.clone().requires_grad_(), ["x"]).inputs[0].requires_grad
    assert collect([Y], ["ids"]).inputs[0].dtype == torch.int64


def test_limit_stops_reading() -> None:
    batches = iter([X] * 100)
    assert len(collect(batches, ["x"], limit=6)) == 6
    assert len(list(batches)) == 98
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
        ([list(torch.zeros(5, 3, 8, 8))], r"is a list of 5 images \(3, 8, 8\); give one tensor, torch.stack"),
        (X * float("nan"), "input 0 holds NaN or infinity, first in image 0"),
        (torch.cat([torch.zeros(70, 2), torch.full((1, 2), float("inf"))]), "first in image 70"),
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


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        ((X, M[:1]), None, r"differ in length: \[1, 4\]"),
        ((X,), Y[:2], "differ in length"),
        ((torch.tensor(1.0),), None, "single number"),
    ],
)
def test_what_makes_no_set(inputs: tuple[Tensor, ...], labels: Tensor | None, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        CalibrationSet(inputs, labels)


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
    numbers = itertools.count()
    monkeypatch.setattr(data, "LARGEST", 1000)
    # 160 bytes a batch.
    assert len(collect((torch.zeros(4, 10) for _ in numbers), ["x"])) == 24
    assert next(numbers) == 7
    assert "calibration uses only the first 24 images: at most 0.0 GB are kept" in caplog.text
    # A tensor that the caller holds anyway is taken whole.
    assert len(collect(torch.zeros(1000, 10), ["x"])) == 1000


class Samples(torch.utils.data.Dataset[object]):
    """Single samples, as torchvision's datasets have them."""

    def __init__(self, samples: Iterable[object]) -> None:
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> object:
        return self.samples[index]


def test_a_dataset_holds_single_images() -> None:
    images = torch.randn(40, 3, 4, 4)
    found = collect(Samples((image, k % 3) for k, image in enumerate(images)), ["x"], limit=35)
    assert torch.equal(found.inputs[0], images[:35])
    assert found.labels is not None
    assert found.labels.tolist() == [k % 3 for k in range(35)]


@pytest.mark.parametrize("samples", [[object(), object()], [torch.zeros(3, 4, 4), torch.zeros(3, 5, 5)]])
def test_a_dataset_without_a_transform_is_refused(samples: list[object]) -> None:
    with pytest.raises(CalibrationError, match=r"samples cannot be batched .*give it a transform that returns tensors"):
        collect(Samples(samples), ["x"])
