from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

import fxquant
from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation
from fxquant.core.ir import Choice
from fxquant.dynamo import check_same_model, graph_of, input_nodes, renamed
from tests.models import MODELS, built
from tests.small import small, small_result

W2, W4, W8 = (Choice(bits, 8) for bits in (2, 4, 8))
PLAN = BitAllocation({"a": W2, "b": W4, "c": W8}, estimator="gram", measured_loss=0.5)


def test_a_plan_is_matched_by_name_or_else_by_position() -> None:
    assert renamed(PLAN, ["c", "a", "b"]) is PLAN
    made = renamed(PLAN, ["x.a", "b", "x.c"]).choices
    assert list(made.items()) == [("x.a", W2), ("b", W4), ("x.c", W8)]


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (["a", "b"], "names 3 layers, the graph has 2; only in the plan: c; only in the graph: none"),
        (["b", "a", "d"], "only in the plan: c; only in the graph: d; at another position: a, b"),
    ],
)
def test_a_plan_of_other_layers_is_refused(sites: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        renamed(PLAN, sites)


class Wrapped(nn.Module):
    """The model under another name, and perhaps something behind it."""

    def __init__(self, *behind: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(small(), *behind)

    def forward(self, x: Tensor) -> object:
        return self.inner(x)


def changed() -> nn.Module:
    model = small()
    with torch.no_grad():
        model.get_parameter("head.weight")[0, 0] += 1.0
    return model


def test_the_same_weights_pass_whatever_their_names() -> None:
    for model in (small(), Wrapped()):
        check_same_model(small_result(), symbolic_trace(model))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (changed(), r"weight 'head.weight' of shape \(3, 6\): its values differ; quantize this"),
        (Wrapped(nn.Linear(3, 2)), r"weight 'inner.1.weight' .*: the result has none of that name or of those values"),
        (small().get_submodule("head"), "the graph lacks stem.weight, stem.bias, body.weight, body.bias and reads"),
    ],
)
def test_other_weights_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_same_model(small_result(), symbolic_trace(model))


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
