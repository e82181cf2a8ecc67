from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

import pytest

from fxquant.cli import HELP, ImageOptions, build_parser, forbidden, image_options, pins, rounding_options
from fxquant.core.errors import OptionError
from fxquant.core.ir import FLOAT, Choice

SPECS = ["--model", "m:f", "--calibration", "x.npz", "--output", "out"]


def refuse(message: str) -> NoReturn:
    raise OptionError(message)


def parsed(*arguments: str) -> argparse.Namespace:
    return build_parser(HELP, refuse).parse_args(arguments)


def test_texts_become_values() -> None:
    args = parsed("quantize", *SPECS, "--budget", "size_mb=1", "--budget", "bops_ratio=0.1", "--bits", "8,2")
    assert args.command == "quantize"
    assert args.budget == ["size_mb=1", "bops_ratio=0.1"]
    assert args.bits == (8, 2)
    assert args.activation_bits == (8,)
    assert args.output == Path("out")
    assert not args.resume


def test_analyze_takes_what_quantize_takes_but_no_budget() -> None:
    assert vars(parsed("analyze", *SPECS)).keys() == vars(parsed("quantize", *SPECS, "--budget", "a=1")).keys() - {
        "budget",
        "rounding",
        "rounding_option",
    }


def test_rounding_options_are_numbers_words_and_lists() -> None:
    told = ["iterations=300", "unit=block", "guard=false", "beta=[20, 2]", "drop=0.5"]
    asked = rounding_options(told)
    assert asked == {"iterations": 300, "unit": "block", "guard": False, "beta": (20, 2), "drop": 0.5}
    with pytest.raises(OptionError, match="NAME=VALUE"):
        rounding_options(["iterations"])


def test_debug_before_or_after_the_command() -> None:
    assert parsed("--debug", "report", "x").debug
    assert parsed("report", "x", "--debug").debug
    assert not parsed("report", "x").debug


@pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("224x320", (224, 320)), ("8X9", (8, 9))])
def test_sizes(text: str, size: tuple[int, int]) -> None:
    args = parsed("analyze", *SPECS, "--image-size", text, "--mean", "0.5", "--std", "0.25")
    assert image_options(args) == ImageOptions(size, (0.5,), (0.25,))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "command"),
        (("quantize",), "see fxquant quantize --help"),
        (("analyze", *SPECS, "--bits", ""), "no list of whole numbers"),
        (("analyze", *SPECS, "--image-size", "2x2x2"), "no size"),
        (("analyze", *SPECS, "--std", "one"), "no list of numbers"),
        (("bench", "x", "--rounds", "many"), "many"),
    ],
)
def test_refused(arguments: tuple[str, ...], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        parsed(*arguments)


def test_forbidden_precisions_are_read() -> None:
    assert forbidden(["a=b*=W2A8,W2A4", "c=float"]) == {"a=b*": (Choice(2, 8), Choice(2, 4)), "c": (FLOAT,)}
    for wrong, message in (
        (["W2A8"], "forbid 'W2A8' is not understood; write GLOB=W2A8,W2A4"),
        (["a=W2"], "precision 'W2' is not understood"),
        (["a=W2A8,"], "precision '' is not understood"),
        (["a=W2A8", "a=W4A8"], "forbid 'a' is given twice"),
    ):
        with pytest.raises(OptionError, match=message):
            forbidden(wrong)


def test_pins_are_read() -> None:
    assert pins(["a=b*=W4A8", "c=float"]) == {"a=b*": Choice(4, 8), "c": FLOAT}
    for wrong in (["a=W4A8", "a=W8A8"], ["W8A8"], ["=W8A8"], ["a=8"]):
        with pytest.raises(OptionError, match=r"pin|precision"):
            pins(wrong)
