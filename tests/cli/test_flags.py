from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from typing import Any, NoReturn, get_args, get_origin

import pytest

import fxquant
from fxquant.cli import ImageOptions, add_flags, given, main
from fxquant.core.errors import OptionError
from fxquant.core.facts import Option, Options, Settings, literals, options_of, rules
from fxquant.core.ir import Choice
from fxquant.dynamo import CompileOptions
from fxquant.flow import KNOWN_NAMES
from tests.small import images, small


@dataclass(frozen=True)
class More(Settings):
    """Settings with one option more.

    Args:
        patience: how long to wait.
    """

    patience: int = field(default=2, metadata=rules(least=1))


class Parser(argparse.ArgumentParser):
    """Raises what it would print."""

    def error(self, message: str) -> NoReturn:
        """Raise."""
        raise OptionError(message)


def parsed(kind: type[Options], *arguments: str) -> dict[str, Any]:
    parser = Parser()
    add_flags(parser, kind, KNOWN_NAMES)
    return given(kind, parser.parse_args(arguments))


def example(option: Option) -> tuple[list[str], Any]:
    """Return arguments that set an option to another value than its default, and that value."""
    flag, names = f"--{option.flag}", [*KNOWN_NAMES.get(option.name, literals(option.kind))]
    if option.kind is bool:
        return [flag], True
    if names:
        name = next(name for name in reversed(names) if name != option.default)
        return [flag, name], (name,) if get_origin(option.kind) is tuple else name
    by_kind = {
        "tuple[int, ...]": ("4,7", (4, 7)),
        "tuple[str, ...]": ("re:a{1,2}=", ("re:a{1,2}=",)),
        "Choice": ("a=b*=W4A8", {"a=b*": Choice(4, 8)}),
        "tuple[Choice, ...]": ("a=b*=W4A8,float", {"a=b*": (Choice(4, 8), Choice(32, 32))}),
        "object": ("beta=[20, 2]", {"beta": (20, 2)}),
        "tuple[float, ...]": ("0.25,0.5", (0.25, 0.5)),
        "float": ("0.5", 0.5),
        "int": ("3", 3),
        "tuple[int | str, ...]": ("3,5", (3, 5)),
    }
    kind = get_args(option.kind)[1] if "Mapping" in str(option.kind) else option.kind
    name = str(getattr(kind, "__name__", kind)) if get_origin(kind) is None else str(kind)
    name = name.replace("fxquant.core.ir.spec.", "").replace(" | None", "")
    text, value = by_kind[name]
    return [flag, text], value


@pytest.mark.parametrize("name", [name for name, option in options_of(More).items() if option.saved])
def test_an_option_is_one_field(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field of the dataclass is an option of every entrance: nothing else has to name it."""
    for module in ("api", "recipes.recipe", "cli.commands", "cli.arguments", "dynamo.backend"):
        monkeypatch.setattr(f"fxquant.{module}.Settings", More)
    arguments, value = example(options_of(More)[name])
    made = More.of({name: value})
    assert getattr(made, name) == value != options_of(More)[name].default
    assert More.of(json.loads(json.dumps(made.to_json()))) == made
    assert parsed(More, *arguments) == {name: value}
    assert CompileOptions.of({"budget": {"average_bits": 4}, "calibration": [], name: value}).quantize == {name: value}

    found: list[Any] = []

    def stop(settings: Settings) -> NoReturn:
        found.append(settings)
        raise OptionError("stopped")

    monkeypatch.setattr("fxquant.flow.check_names", stop)
    with pytest.raises(OptionError, match="stopped"):
        fxquant.quantize(small(), images(), None, options={name: value})
    command = "quantize" if name.startswith("rounding") else "analyze"
    more = ["--budget", "average_bits=4"] if command == "quantize" else []
    specs = ["--model", "tests.small:small", "--calibration", "tests.small:images", "--output", "unused"]
    monkeypatch.setattr("fxquant.cli.commands.check_packages", lambda _: None)
    assert main([command, *specs, *more, *arguments]) == 2
    assert [getattr(settings, name) for settings in found] == [value, value]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--activation-bits", ""), "argument --activation-bits: activation_bits='' must be a list of whole numbers"),
        (("--activation-bits", "4,x"), "activation_bits='4,x' must be a list of whole numbers"),
        (("--rounds", "many"), "rounds='many' must be a whole number of at least 0"),
        (("--effort", "max"), "unknown effort 'max'; known: fast, default, best"),
        (("--pin", "W8A8"), "'W8A8' is not understood; write PATTERN=W8A8"),
        (("--pin", "=W8A8"), "is not understood"),
        (("--pin", "a=8"), "precision '8' is not understood"),
        (("--pin", "a=W8A8", "--pin", "a=W4A8"), "--pin 'a' is given twice"),
        (("--forbid", "a=W2A8,"), "precision '' is not understood"),
        (("--rounding-option", "iterations"), "write NAME=VALUE"),
    ],
)
def test_values_that_are_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parsed(Settings, *arguments)


def test_rounding_options_are_numbers_words_and_lists() -> None:
    texts = ("iterations=300", "unit=block", "guard=false", "beta=[20, 2]")
    found = parsed(Settings, *(part for text in texts for part in ("--rounding-option", text)))
    assert found == {"rounding_options": {"iterations": 300, "unit": "block", "guard": False, "beta": (20, 2)}}


@pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("224x320", (224, 320)), ("8X9", (8, 9))])
def test_sizes(text: str, size: tuple[int, int]) -> None:
    found = parsed(ImageOptions, "--image-size", text, "--mean", "0.5", "--std", "0.25")
    assert ImageOptions.of(found) == ImageOptions(size, (0.5,), (0.25,))
    for wrong in ("2x2x2", "axb", "0"):
        with pytest.raises(OptionError, match="must be 2 whole numbers of at least 1"):
            parsed(ImageOptions, "--image-size", wrong)


def test_help_says_what_an_option_does_its_names_and_its_default() -> None:
    parser = Parser()
    add_flags(parser, More, KNOWN_NAMES)
    text = " ".join(parser.format_help().split())
    assert "--patience N how long to wait (default 2)" in text
    assert "--effort NAME how much is measured: fast, default, best (default default)" in text
    assert "--distributed" not in text
