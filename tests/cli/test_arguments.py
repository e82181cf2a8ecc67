from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

import pytest

from fxquant.cli import HELP, build_parser
from fxquant.core.errors import OptionError

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
    assert not hasattr(args, "activation_bits")
    assert args.output == Path("out")
    assert not args.resume


def test_analyze_takes_what_quantize_takes_but_no_budget() -> None:
    assert vars(parsed("analyze", *SPECS)).keys() == vars(parsed("quantize", *SPECS, "--budget", "a=1")).keys() - {
        "budget"
    }
    with pytest.raises(OptionError, match="unrecognized arguments: --rounding gptq"):
        parsed("analyze", *SPECS, "--rounding", "gptq")


def test_debug_before_or_after_the_command() -> None:
    assert parsed("--debug", "report", "x").debug
    assert parsed("report", "x", "--debug").debug
    assert not parsed("report", "x").debug


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "command"),
        (("quantize",), "see fxquant quantize --help"),
        (("analyze", *SPECS, "--std", "one"), "std='one' must be a list of finite numbers"),
        (("bench", "x", "--rounds", "many"), "many"),
    ],
)
def test_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parsed(*arguments)
