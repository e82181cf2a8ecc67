"""Command-line flags made from the fields of option classes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from fxquant.core.errors import OptionError
from fxquant.core.facts import Option, Options, literals, options_of
from fxquant.core.ir import Choice


def add_flags(
    parser: argparse.ArgumentParser,
    kind: type[Options],
    names: Mapping[str, Collection[str]] | None = None,
    only: Collection[str] | None = None,
    leave: Collection[str] = (),
) -> None:
    """Add a flag for each option of a class; `given` returns those that were used.

    Lists of numbers and of known names are separated by commas. Lists of patterns and mappings are given by repeating
    the flag, since a pattern may hold a comma.

    Args:
        parser: where to add them.
        kind: the class.
        names: option -> names that its help lists.
        only: options to add; None for all.
        leave: options to leave out.
    """
    for name, option in options_of(kind).items():
        if not option.saved or name in leave or (only is not None and name not in only):
            continue
        known = (names or {}).get(name, literals(option.kind))
        form = _form(option.kind, bool(known))
        details: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(option, known)}
        if form == "flag":
            details["action"] = argparse.BooleanOptionalAction if option.default else "store_true"
        else:
            details |= {"metavar": form, "type": partial(_value, option, form)}
            if form == "PATTERN" or "=" in form:
                details["action"] = "append"
        parser.add_argument(f"--{option.flag}", **details)


def given(kind: type[Options], args: argparse.Namespace) -> dict[str, Any]:
    """Return option -> value for the flags of a class that were used.

    Raises:
        OptionError: a pattern or name is given twice.
    """
    found: dict[str, Any] = {}
    for name, option in options_of(kind).items():
        if not hasattr(args, name):
            continue
        value = getattr(args, name)
        if get_origin(option.kind) is Mapping:
            keys = [key for key, _ in value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise OptionError(f"--{option.flag} {twice!r} is given twice; give it once")
            value = dict(value)
        elif isinstance(value, list):
            value = tuple(value)
        found[name] = value
    return found


def _form(kind: Any, has_names: bool) -> str:
    """Return how a value is written on the command line."""
    kind, inside = _plain_kind(kind), get_args(_plain_kind(kind))
    if kind is bool:
        return "flag"
    if get_origin(kind) is Mapping:
        if inside[1] is object:
            return "NAME=VALUE"
        return "PATTERN=W8A8" if inside[1] is Choice else "PATTERN=W8A8,W4A8"
    if get_origin(kind) is tuple:
        if ... not in inside:
            return "N|HxW"
        return "N,N" if inside[0] is not str else "NAME,NAME" if has_names else "PATTERN"
    return "N" if kind in (int, float) else "NAME"


def _plain_kind(kind: Any) -> Any:
    """Return the type without None and, of several, the first."""
    if get_origin(kind) in (Union, UnionType):
        return next(part for part in get_args(kind) if part is not NoneType)
    return kind


def _help(option: Option, known: Collection[str]) -> str:
    text = option.help.rstrip(".")
    if known:
        text += f": {', '.join(map(str, known))}"
    if option.default not in (None, False, (), {}):
        default = option.default
        text += f" (default {','.join(map(str, default)) if isinstance(default, tuple) else default})"
    return text.replace("%", "%%")


def _value(option: Option, form: str, text: str) -> Any:
    """Return the value that a text on the command line means.

    Raises:
        ArgumentTypeError: it means none; the message says what is allowed.
    """
    try:
        if "=" in form:
            key, separator, value = text.rpartition("=")
            if not separator or not key:
                raise OptionError(f"{text!r} is not understood; write {form}")
            read = _json(value) if form == "NAME=VALUE" else value.split(",")
            checked = option.checked({key: read if "," in form or form == "NAME=VALUE" else value})
            return key, checked[key]
        return text if form == "PATTERN" else option.checked(_converted(_plain_kind(option.kind), form, text))
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _converted(kind: Any, form: str, text: str) -> Any:
    """Return the text as numbers or names; the text itself where it is not of that form, for the check to refuse."""
    if get_origin(kind) is Literal:
        kind = type(get_args(kind)[0])
    try:
        if form == "N|HxW":
            height, _, width = text.lower().partition("x")
            return int(height), int(width or height)
        if get_origin(kind) is tuple:
            return tuple(_member(get_args(kind)[0], part.strip()) for part in text.split(",") if part.strip()) or text
        return kind(text)
    except ValueError:
        return text


def _member(kind: Any, part: str) -> Any:
    """Return one member of a list as the first of its types that reads it."""
    kinds = get_args(kind) or (kind,)
    for each in kinds[:-1]:
        with suppress(ValueError):
            return each(part)
    return kinds[-1](part)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        # A word such as block needs no quotation marks.
        return text
