from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.core.errors import OptionError
from fxquant.core.facts import Target
from fxquant.core.ir import FLOAT, Choice, Edge, QuantSpec, Site, Sites, activation_spec, site_name, weight_spec

SITE = Site("fc", "linear", "fc.weight", ("linear",), 8, 2, 2, 8, "x", (Choice(4, 8), Choice(8, 8)))


@pytest.mark.parametrize(
    ("spec", "ends"),
    [
        (activation_spec(8), (0, 255)),
        (activation_spec(2), (0, 3)),
        (weight_spec(8), (-128, 127)),
        (weight_spec(2), (-2, 1)),
        (QuantSpec(4, signed=True, symmetric=False), (-8, 7)),
    ],
)
def test_ends_of_grids(spec: QuantSpec, ends: tuple[int, int]) -> None:
    assert (spec.qmin, spec.qmax) == ends


@pytest.mark.parametrize("bits", [1, 9, 32, 0, -4])
def test_widths_out_of_range(bits: int) -> None:
    with pytest.raises(OptionError, match=rf"bits={bits} is out of range; allowed: 2\.\.8"):
        QuantSpec(bits, signed=True, symmetric=True)
    if bits != 32:
        with pytest.raises(OptionError, match="out of range"):
            Choice(bits, 8)


def test_unsigned_symmetric_grids_are_refused() -> None:
    with pytest.raises(OptionError, match="unsigned grid cannot be symmetric"):
        QuantSpec(8, signed=False, symmetric=True)


@given(st.integers(2, 8), st.integers(2, 8))
@settings(max_examples=20, deadline=None)
def test_labels_read_back(weight: int, activation: int) -> None:
    choice = Choice(weight, activation)
    assert Choice.parse(choice.label) == choice
    assert not choice.is_float


def test_float_is_a_choice_and_the_widest() -> None:
    assert Choice.parse("float") is FLOAT
    assert FLOAT.label == "float"
    assert sorted([FLOAT, Choice(8, 8), Choice(2, 8)]) == [Choice(2, 8), Choice(8, 8), FLOAT]


def test_float_weights_read_float() -> None:
    with pytest.raises(OptionError, match="W32A8 has float weights that read integers"):
        Choice(32, 8)


@pytest.mark.parametrize("label", ["W4", "W2c", "W2.5r"])
def test_weights_alone(label: str) -> None:
    choice = Choice.parse(label)
    assert choice.weights_only
    assert choice.label == label
    assert Choice.parse(f"{label}A8").alone == choice
    assert not FLOAT.weights_only


@given(st.text(alphabet="WA0123456789 ²٣-.float", max_size=8))
@settings(max_examples=200, deadline=None)
def test_any_other_label_is_an_option_error(label: str) -> None:
    try:
        choice = Choice.parse(label)
    except OptionError:
        return
    assert Choice.parse(choice.label) == choice
    if label != "float":
        widths = [int(part) for part in label[1:].split("A")]
        assert widths == [choice.weight_bits, choice.activation_bits][: len(widths)]


@pytest.mark.parametrize("label", ["W²A8", "w4a8", "4A8", "W4A8 ", "W-4A8", "FLOAT", "", "W444A8", "WA", "W4A8A8"])
def test_labels_not_understood(label: str) -> None:
    with pytest.raises(OptionError, match="is not understood; write W4A8"):
        Choice.parse(label)


def test_sites_are_checked_and_found() -> None:
    other = replace(SITE, name="conv")
    sites = Sites((SITE, other), {})
    assert sites.by_name("conv") is other
    assert [c.site for c in sites.candidates] == ["fc", "fc", "conv", "conv"]
    with pytest.raises(OptionError, match="no site is called 'cnv'; sites: fc, conv"):
        sites.by_name("cnv")
    with pytest.raises(OptionError, match=r"not unique: \['fc'\]"):
        Sites((SITE, SITE), {})
    with pytest.raises(OptionError, match="'fc' has no allowed precision"):
        replace(SITE, choices=())


@pytest.mark.parametrize(
    ("path", "name"), [("layer1.0.conv.weight", "layer1.0.conv"), ("attn.in_proj_weight", "attn.in_proj_weight")]
)
def test_site_names_are_module_paths(path: str, name: str) -> None:
    assert site_name(path) == name


def test_edges_sort_by_name() -> None:
    assert sorted([Edge("b", "a", 0), Edge("a", "c", 1), Edge("a", "c", 0)])[0] == Edge("a", "c", 0)


@pytest.mark.parametrize("storage", [{4: 4}, {4: 4, 8: 4}])
def test_targets_store_widths_in_no_less(storage: dict[int, int]) -> None:
    with pytest.raises(OptionError, match="stores 8-bit weights in"):
        Target("t", {}, frozenset(), weight_bits=(4, 8), activation_bits=(8,), storage_bits=storage)


def test_activations_take_a_byte_where_the_target_does_not_pack() -> None:
    plain = Target("t", {}, frozenset(), (8,), (4, 8), {8: 8})
    assert [plain.activation_storage(bits) for bits in (4, 8, 32)] == [8, 8, 32]
    packing = Target("t", {}, frozenset(), (8,), (3, 8), {8: 8}, activation_storage_bits={3: 4})
    assert [packing.activation_storage(bits) for bits in (3, 8, 32)] == [4, 8, 32]
    with pytest.raises(OptionError, match="stores 4-bit activations in 2 bits; give a width >= 4"):
        Target("t", {}, frozenset(), (8,), (4, 8), {8: 8}, activation_storage_bits={4: 2})
