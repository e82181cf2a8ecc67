from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import Graph

from fxquant.capture import capture
from fxquant.core.errors import OptionError
from fxquant.core.facts import Settings, found, matching, module_types, site_types
from fxquant.core.ir import Sites
from fxquant.flow import find_sites
from tests.small import small

NAMES = ["layer1.conv1", "layer1.conv2", "layer2.conv1", "head"]
TYPES = {
    "layer1.conv1": {"conv", "Conv2d", "torch.nn.modules.conv.Conv2d", "ResidualBlock"},
    "layer1.conv2": {"conv", "MyConv", "ResidualBlock"},
    "layer2.conv1": {"conv", "Conv2d"},
    "head": {"linear", "Linear"},
}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("head", ["head"]),
        ("layer1.*", ["layer1.conv1", "layer1.conv2"]),
        ("*conv[!1]", ["layer1.conv2"]),
        (r"re:layer\d\.conv1", ["layer1.conv1", "layer2.conv1"]),
        ("re:layer1", []),
        ("re:LAYER1.*", []),
        ("type:Conv2d", ["layer1.conv1", "layer2.conv1"]),
        ("type:*Conv", ["layer1.conv2"]),
        ("type:torch.nn.*", ["layer1.conv1"]),
        ("type:ResidualBlock", ["layer1.conv1", "layer1.conv2"]),
        ("type:linear", ["head"]),
        ("type:conv2d", []),
        ("Conv2d", []),
    ],
)
def test_globs_expressions_and_types(pattern: str, names: list[str]) -> None:
    assert found(pattern, NAMES, TYPES) == names
    if names:
        assert matching(pattern, NAMES, TYPES) == names


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layer1.cnv1", r"^pattern 'layer1.cnv1' matches no site; near: layer1.conv1"),
        ("re:layer1.cnv1", r"^pattern 're:layer1.cnv1' matches no site; near: layer1.conv1"),
        ("type:Conv3d", r"^pattern 'type:Conv3d' matches no site; near: Conv2d"),
        ("xyz", r"near: layer1.conv1, layer1.conv2, layer2.conv1$"),
        ("re:(", r"^pattern 're:\(' is not a regular expression: missing \)"),
    ],
)
def test_what_matches_nothing_is_reported_with_what_is_near(pattern: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        matching(pattern, NAMES, TYPES)


def test_types_of_a_captured_network() -> None:
    program = find_sites(capture(small(), (torch.zeros(2, 1, 8, 8),)), Settings(target="reference"))
    types = site_types(program.module.graph, program[Sites].sites)
    assert {"conv", "Conv2d", "torch.nn.modules.conv.Conv2d", "SmallNet"} <= types["stem"]
    assert {"linear", "Linear", "SmallNet"} <= types["head"]
    assert "Conv2d" not in types["head"]


def test_types_may_be_classes() -> None:
    node = Graph().placeholder("x")
    assert module_types(node) == set()
    node.meta["nn_module_stack"] = {"a": ("a", nn.Linear)}
    assert module_types(node) == {"Linear", "torch.nn.modules.linear.Linear"}


def test_settings_take_every_form() -> None:
    program = capture(small(), (torch.zeros(2, 1, 8, 8),))
    kept = find_sites(program, Settings(target="reference", keep_float=("type:Linear", "re:st.*")))
    assert [site.name for site in kept[Sites].sites] == ["body"]
    with pytest.raises(OptionError, match="'type:LSTM' matches no site"):
        find_sites(program, Settings(target="reference", keep_float=("type:LSTM",)))
