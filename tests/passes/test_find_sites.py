from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxquant.capture import capture
from fxquant.core.errors import OptionError
from fxquant.core.ir import FLOAT, Choice, Site, Sites
from fxquant.passes import Canonicalize, FindEdges, FindSites, TieEdges
from tests.models import MODELS, Composed
from tests.programs import TARGET, check_pass, folded, tied

W2, W4, W8 = Choice(2, 8), Choice(4, 8), Choice(8, 8)


def sites_of(name: str, **options: Any) -> Sites:
    settings: dict[str, Any] = {"bits": (2, 4, 8), "activation_bits": (8,), **options}
    return check_pass(FindSites(TARGET, **settings), tied(name))[Sites]


def test_the_sites_of_a_residual_network() -> None:
    sites = sites_of("residual").sites
    assert [site.name for site in sites] == ["conv1", "conv2", "conv3", "fc"]
    assert sites[0] == Site(
        name="conv1",
        kind="conv",
        weight="conv1.weight",
        nodes=("conv2d",),
        weight_count=216,
        channels=8,
        bias_count=8,
        macs=8 * 8 * 216,
        input_tie="x",
        choices=(W2, W4, W8),
    )
    assert sites[3].kind == "linear"
    assert sites[3].macs == 40


def test_a_shared_weight_is_one_site_with_all_its_work() -> None:
    conv, linear = sites_of("shared").sites
    assert conv.nodes == ("conv2d", "conv2d_1")
    assert conv.macs == 2 * 36 * 144
    assert linear.nodes == ("linear", "linear_1")
    assert linear.name in ("fc_a", "fc_b")


def test_without_bias_and_with_a_table_for_a_weight() -> None:
    sites = sites_of("tokens")
    assert sites.by_name("out").bias_count == 0
    assert sites.by_name("out").nodes == ("linear_1",), "the embedding that reads the same table computes in float"
    assert sites.by_name("out").followers == ("embedding",)
    assert not sites.refusals
    assert sites_of("two_inputs").by_name("mask").bias_count == 0


@pytest.mark.parametrize("name", ["residual", "separable", "padded", "sequence", "attention", "shared", "two_inputs"])
def test_macs_are_those_of_one_image(name: str) -> None:
    """Also where images stand on the second axis, as in attention."""
    inputs, module = MODELS[name].inputs(1), folded(name).module
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    products = 0 if name != "attention" else 2 * (2 * 5 * 5 * 8)
    assert sum(site.macs for site in sites_of(name).sites) + products == counter.get_total_flops() / 2


def test_nothing_to_quantize() -> None:
    assert sites_of("weightless").sites == ()
    assert sites_of("weightless", pin_ends=True).candidates == ()


def test_choices_are_sorted_and_unique() -> None:
    sites = sites_of("residual", bits=(8, 4, 4, 32), activation_bits=(8, 4)).sites
    assert sites[0].choices == (Choice(4, 4), Choice(4, 8), Choice(8, 4), Choice(8, 8), FLOAT)


def test_pins() -> None:
    sites = sites_of("residual", pins={"conv*": W2, "conv3": W8})
    assert [site.choices for site in sites.sites] == [(W2,), (W2,), (W8,), (W2, W4, W8)]
    ends = sites_of("residual", pin_ends=True)
    assert [len(site.choices) for site in ends.sites] == [1, 3, 3, 1]
    both = sites_of("residual", pin_ends=True, pins={"fc": W4})
    assert both.by_name("fc").choices == (W4,), "what is named outdoes the convention"
    assert sites_of("residual", pins={"fc": FLOAT}).by_name("fc").choices == (FLOAT,)


def test_layers_by_expression_and_type() -> None:
    sites = sites_of("residual", pins={"type:Conv2d": W2, "re:conv[23]": W8}, forbid={"type:linear": (W2,)})
    assert [site.choices for site in sites.sites] == [(W2,), (W8,), (W8,), (W4, W8)]
    every = sites_of("residual", pins={"type:Residual*": W4})
    assert {site.choices for site in every.sites} == {(W4,)}, "classes around a layer count"
    with pytest.raises(OptionError, match=r"pattern 'type:Conv2D' matches no site; near: Conv2d"):
        sites_of("residual", pins={"type:Conv2D": W4})


def test_forbidden_precisions_are_no_candidates() -> None:
    found = sites_of("residual", forbid={"conv*": (W2,), "conv3": (W4, W8), "fc": (FLOAT,)}, bits=(2, 4, 8, 32))
    assert [site.choices for site in found.sites] == [(W4, W8, FLOAT), (W4, W8, FLOAT), (FLOAT,), (W2, W4, W8)]
    pinned = sites_of("residual", forbid={"*": (W2,)}, pins={"fc": W4})
    assert [site.choices for site in pinned.sites] == [(W4, W8), (W4, W8), (W4, W8), (W4,)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forbid": {"cnv2": (W2,)}}, r"pattern 'cnv2' matches no site; near: conv2"),
        (
            {"forbid": {"conv*": (W2, W4), "conv2": (W8,)}},
            "forbid leaves site 'conv2' without a precision: of W2A8, W4A8",
        ),
        (
            {"forbid": {"fc": (W4,)}, "pins": {"f*": W4}},
            "forbid leaves site 'fc' without a precision: of W4A8, its cand",
        ),
        ({"forbid": {"*": (W8,)}, "pin_ends": True}, "forbid leaves site 'conv1'.*pin or search another"),
    ],
)
def test_forbidding_what_is_needed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        sites_of("residual", **options)


def test_a_glob_that_matches_nothing_suggests_near_names() -> None:
    with pytest.raises(OptionError, match=r"pattern 'cnv2' matches no site; near: conv2"):
        sites_of("residual", pins={"cnv2": W4})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": ()}, r"bits=\(\): target 'test' does not execute an empty list"),
        ({"activation_bits": ()}, "does not execute an empty list"),
        ({"bits": (3, 8)}, r"bits=\(3, 8\): target 'test' does not execute \[3\]; it executes \[2, 4, 8\]"),
        ({"activation_bits": (16,)}, r"does not execute \[16\]"),
        ({"activation_bits": (32,)}, r"does not execute \[32\]"),
        ({"pins": {"fc": Choice(5, 8)}}, "pin 'fc': target 'test' does not execute W5A8"),
        ({"pins": {"fc": Choice(4, 6)}}, "pin 'fc': target 'test' does not execute W4A6"),
    ],
)
def test_widths_the_target_does_not_execute(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        sites_of("residual", **options)


def test_refusals_are_those_that_do_work() -> None:
    refusals = sites_of("functional").refusals
    assert set(refusals) == {"conv2d", "conv2d_1", "matmul"}
    assert set(sites_of("attention").refusals) == {"matmul", "matmul_1"}


def test_layers_that_only_run_in_float_are_counted() -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = net.recurrent(net.stem(x))[0].mean(dim=1)
        return torch.einsum("bi,io->ob", y, net.mix)

    layers = {"stem": nn.Linear(3, 4), "recurrent": nn.LSTM(4, 4, batch_first=True)}
    mixed = Composed(forward, **layers, mix=nn.Parameter(torch.randn(4, 2))).eval()
    program = Canonicalize()(capture(mixed, (torch.randn(2, 5, 3),)))
    sites = FindSites(TARGET, (8,), (8,))(TieEdges()(FindEdges(TARGET)(program)))[Sites]
    assert {site.name: site.kind for site in sites.sites if site.stored} == {
        "recurrent.weight_ih_l0": "lstm",
        "recurrent.weight_hh_l0": "lstm",
        "mix": "einsum",
    }
    assert {choice.label for site in sites.sites if site.stored for choice in site.choices} == {"W8"}
    assert not sites.refusals
    # An accelerator's file does not say that it unpacks weights.
    described = replace(TARGET, runs_on="onnxruntime")
    sites = FindSites(described, (8,), (8,))(TieEdges()(FindEdges(described)(program)))[Sites]
    assert [site.name for site in sites.sites] == ["stem"]
    reasons = list(sites.refusals.values())
    assert len(reasons) == 2
    assert ["recurrent" in reasons[0], "einsum" in reasons[1]] == [True] * 2
