"""Lowered graphs hold their weights packed: in the state dict, in a pickle, in an exported program."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.fx import GraphModule

from fxquant.backends.int8 import FxInt8Backend, PackedLayer, compiled, packed_weight, unpacked_weight
from fxquant.core.errors import LoweringError
from fxquant.core.storage import packed_bytes
from tests.backends.onnx.weight_forms import FORMS, with_integers

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def lowered(form: str) -> tuple[GraphModule, int]:
    """Return a network whose weights have a form, and the bytes of these."""
    module, integers = with_integers(FORMS[form])
    return FxInt8Backend().lower(module), sum(packed_bytes(q) for q in integers.values())


def written(exported: torch.export.ExportedProgram) -> bytes:
    file = io.BytesIO()
    torch.export.save(exported, file)
    return file.getvalue()


@pytest.mark.parametrize("form", FORMS)
def test_the_state_dict_holds_the_packed_bytes(form: str) -> None:
    graph, counted = lowered(form)
    state = graph.state_dict()
    assert sum(tensor.nbytes for name, tensor in state.items() if name.endswith(".packed")) == counted
    assert {name.rpartition(".")[2] for name in state} == {"packed", "scales", "bias"}


@pytest.mark.parametrize("form", ["3 bits", "8 bits", "5 levels", "4 levels a row", "rows of several widths"])
def test_copies_pickles_states_and_exported_programs_answer_alike(form: str) -> None:
    graph, counted = lowered(form)
    expected = graph(X)
    assert torch.equal(copy.deepcopy(graph)(X), expected)
    file = io.BytesIO()
    torch.save(graph, file)
    # Beside the weights there are six layers with their grids.
    assert len(file.getvalue()) < counted + 20_000
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), expected)
    exported = torch.export.export(graph, (X,))
    held = [*exported.state_dict.values(), *exported.constants.values()]
    biases_and_scales = 4 * 5 * (48 + 64 + 64 + 90 + 71 + 33)
    assert sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor)) < counted + biases_and_scales
    again = torch.export.load(io.BytesIO(written(exported))).module()
    assert torch.equal(again(X), expected)
    assert torch.equal(again(X), expected)


def test_a_state_that_is_loaded_replaces_all_that_was_prepared() -> None:
    (one, _), (other, _) = lowered("3 bits"), lowered("4 levels")
    with pytest.raises(RuntimeError, match="size mismatch for integer"):
        one.load_state_dict(other.state_dict())
    module, _ = with_integers(lambda rows, columns, seed: FORMS["3 bits"](rows, columns, seed + 1000))
    negative = FxInt8Backend().lower(module)
    assert not torch.equal(negative(X), lowered("3 bits")[0](X))
    one, _ = lowered("3 bits")
    _ = one(X)
    one.load_state_dict(negative.state_dict())
    assert torch.equal(one(X), negative(X))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["3 bits", "rows of several widths"])
def test_compiled_code_answers_alike(form: str) -> None:
    graph, _ = lowered(form)
    answer, expected = compiled(copy.deepcopy(graph))(X), graph(X)
    # Inductor rounds some sums the other way.
    assert float((answer - expected).abs().max()) <= 0.05 * float(expected.abs().max())


def test_integers_in_bytes_are_not_held_twice() -> None:
    graph, _ = lowered("8 bits")
    layer = graph.get_submodule("integer.conv2d")
    assert isinstance(layer, PackedLayer)
    assert layer.weight.data_ptr() == layer.packed.data_ptr()


def test_bytes_of_another_form_are_refused() -> None:
    data, form = packed_weight(torch.ones(4, 30, dtype=torch.int8))
    assert torch.equal(unpacked_weight(data, form), torch.ones(4, 30))
    with pytest.raises(
        LoweringError, match=r"17 bytes are not a weight of the form \(2, 4, 30, .*lower the graph again"
    ):
        unpacked_weight(torch.cat([data, data[:1]]), form)
