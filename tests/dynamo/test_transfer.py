from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

import fxquant
from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation
from fxquant.core.ir import Choice
from fxquant.dynamo import check_same_model, graph_of, input_nodes, renamed
from fxquant.result import Result
from tests.models import MODELS, built
from tests.small import small, small_result

W2, W4, W8 = (Choice(bits, 8) for bits in (2, 4, 8))
PLAN = BitAllocation({"a": W2, "b": W4, "c": W8}, estimator="gram", measured_loss=0.5)


def test_a_plan_of_the_same_names_stays_as_it_is() -> None:
    assert renamed(PLAN, ["c", "a", "b"]) is PLAN


def test_other_names_are_taken_one_after_the_other() -> None:
    made = renamed(PLAN, ["x.a", "b", "x.c"])
    assert made.choices == {"x.a": W2, "b": W4, "x.c": W8}
    assert list(made.choices) == ["x.a", "b", "x.c"]


def test_another_number_of_layers_is_refused() -> None:
    with pytest.raises(
        OptionError, match=r"names 3 layers, the graph has 2; only in the plan: c; only in the graph: none"
    ):
        renamed(PLAN, ["a", "b"])


def test_layers_that_changed_places_are_refused() -> None:
    with pytest.raises(OptionError, match="only in the plan: c; only in the graph: d; at another place: a, b"):
        renamed(PLAN, ["b", "a", "d"])


def known() -> Result:
    return small_result()


def test_the_same_weights_pass_whatever_their_names() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()

        def forward(self, x: torch.Tensor) -> object:
            return self.inner(x)

    check_same_model(known(), symbolic_trace(Wrapped()))
    check_same_model(known(), symbolic_trace(small()))


def test_other_values_are_refused() -> None:
    model = small()
    with torch.no_grad():
        model.get_parameter("head.weight")[0, 0] += 1.0
    with pytest.raises(OptionError, match=r"weight 'head.weight' of shape \(3, 6\): its values differ; quantize this"):
        check_same_model(known(), symbolic_trace(model))


def test_a_weight_that_the_result_lacks_is_refused() -> None:
    with pytest.raises(OptionError, match=r"weight '1.weight' .*: the result has none of that name or of those values"):
        check_same_model(known(), symbolic_trace(nn.Sequential(small(), nn.Linear(3, 2))))


def test_a_part_of_the_model_is_refused() -> None:
    with pytest.raises(OptionError, match=r"the graph lacks stem.weight, stem.bias, body.weight, body.bias and reads"):
        check_same_model(known(), symbolic_trace(small().get_submodule("head")))


def test_inputs_come_in_the_order_of_the_compiled_graph() -> None:
    model, x = built("two_inputs"), MODELS["two_inputs"].inputs(4)
    result = fxquant.quantize(
        model, [MODELS["two_inputs"].inputs(8)], None, target="fx_int8", effort="fast", progress=False
    )
    module = symbolic_trace(model)
    one, other = module.graph.find_nodes(op="placeholder")
    one.prepend(other)
    module.recompile()
    made = graph_of(result, module)
    assert list(input_nodes(made)) == list(input_nodes(module)) == list(input_nodes(result.lowered))[::-1]
    for mine, theirs in zip(made(*x[::-1]), result.lowered(*x).values(), strict=True):
        assert torch.equal(mine, theirs)
