"""Options as fields of frozen dataclasses: one line declares an option, and everything else is derived from it.

A class that inherits `Options` checks and converts its fields when it is made, reads and writes JSON, and refuses
unknown names with the nearest known one. `fxquant.cli` makes command-line flags of the same fields. The text of an
option is its line under "Args:" in the docstring of the class.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from fxquant.core.errors import OptionError
from fxquant.core.facts.target import Target
from fxquant.core.ir import Choice
from fxquant.core.registry import unknown

NOUNS = {int: "whole number", float: "finite number", str: "text", Choice: "precision such as W4A8", Path: "path"}
"""Type of an option -> what messages call a value of it."""


FUNCTION = "function "
"""What the text of an option begins with whose value is a function."""
BY_EFFORT: Any = None
"""Default of an option whose value is chosen later, by the preset in use."""
BY_TARGET: Any = None
"""Default of an option whose value is chosen later, by the target in use."""


def rules(
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    flag: str | None = None,
    saved: bool = True,
) -> dict[str, Any]:
    """Return the metadata of a field that is an option.

    Args:
        least: the smallest allowed number.
        most: the largest allowed number.
        above: numbers must be larger than this.
        below: numbers must be smaller than this.
        flag: the command-line flag without dashes; by default the name of the field.
        saved: whether the option is written to JSON and has a flag; False for what only concerns one call.
    """
    return {"least": least, "most": most, "above": above, "below": below, "flag": flag, "saved": saved}


@dataclass(frozen=True)
class Option:
    """What is known of one option.

    Args:
        name: name of the field.
        kind: its type.
        default: its value where none is given.
        help: its text in the docstring of the class.
        least: the smallest allowed number, None for any.
        most: the largest allowed number, None for any.
        above: numbers must be larger than this, None for any.
        below: numbers must be smaller than this, None for any.
        flag: the command-line flag without dashes.
        saved: whether it is written to JSON and has a flag.
    """

    name: str
    kind: Any
    default: Any
    help: str
    least: float | None
    most: float | None
    above: float | None
    below: float | None
    flag: str
    saved: bool

    def checked(self, value: object) -> Any:
        """Return a value of the option's type: lists become tuples, labels precisions, one value a tuple of one.

        Raises:
            OptionError: a value of another type or out of range.
        """
        if value is None and self.default is None:
            return None
        names = literals(self.kind)
        if names and isinstance(value, str) and value not in names:
            raise unknown(self.name, value, names)
        try:
            return self._bounded(_read(self.kind, value))
        except (TypeError, ValueError) as error:
            raise OptionError(f"{self.name}={value!r} must be {self._allowed()}") from error

    def _bounded(self, value: Any) -> Any:
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not (
                (self.least is None or number >= self.least)
                and (self.most is None or number <= self.most)
                and (self.above is None or number > self.above)
                and (self.below is None or number < self.below)
            ):
                raise ValueError
        return value

    def _allowed(self) -> str:
        """Return the allowed values, as the end of "... must be"."""
        bounds = {"of at least": self.least, "at most": self.most, "above": self.above, "below": self.below}
        said = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
        return f"{_noun(self.kind)} {said}".strip()


def literals(kind: Any) -> tuple[str, ...]:
    """Return the names that a `Literal` type, or a union with one, allows; none for other types."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(name for part in parts if get_origin(part) is Literal for name in get_args(part))


def _noun(kind: Any) -> str:
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_noun(part) for part in inside if part is not NoneType)
    if origin is Literal:
        return f"one of {', '.join(map(repr, inside))}"
    if origin is Callable:
        return "a function"
    if origin is tuple:
        many = NOUNS.get(inside[0], str(inside[0])) + "s"
        return f"a list of {many}" if ... in inside else f"{len(inside)} {many}"
    if origin is Mapping:
        return "a mapping of texts to values"
    return "True or False" if kind is bool else f"a {NOUNS.get(kind, getattr(kind, '__name__', str(kind)))}"


def _read(kind: Any, value: Any) -> Any:
    """Return the value as its type has it.

    Raises:
        TypeError, ValueError: it cannot be of this type.
    """
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _read_any(inside, value)
    if origin is Literal and value in inside:
        return value
    if origin is tuple:
        single = isinstance(value, str | bytes) or not isinstance(value, Iterable)
        values = (value,) if single else tuple(value)
        kinds = (inside[0],) * len(values) if ... in inside else inside
        return tuple(_read(each, part) for each, part in zip(kinds, values, strict=True))
    if origin is Mapping:
        return {_read(inside[0], key): _read(inside[1], part) for key, part in dict(value).items()}
    if origin is Callable and callable(value) and not isinstance(value, type):
        return value
    if kind is object:
        return _plain(value)
    if kind is Choice and isinstance(value, str):
        return Choice.parse(value)
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        if number and math.isfinite(value):
            return kind(value)
    elif isinstance(kind, type) and isinstance(value, kind):
        return value
    raise TypeError


def _read_any(kinds: tuple[Any, ...], value: Any) -> Any:
    if value is None and NoneType in kinds:
        return None
    for kind in kinds:
        try:
            return _read(kind, value)
        except (TypeError, ValueError):
            continue
    raise TypeError


def _plain(value: Any) -> Any:
    """Return a number, a text, None or a tuple of such, as JSON can hold them."""
    if isinstance(value, list | tuple):
        return tuple(_read(float | int | str, part) for part in value)
    return _read(bool | int | float | str | None, value)


def _written(value: Any) -> Any:
    if isinstance(value, Choice):
        return value.label
    if isinstance(value, Mapping):
        return {key: _written(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return [_written(part) for part in value]
    if isinstance(value, Target):
        return value.name
    if callable(value):
        return function_name(value)
    return str(value) if isinstance(value, Path) else value


def function_name(function: Any) -> str:
    """Return what files and messages say for a function, which no file can hold."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{FUNCTION}{named.__module__}.{named.__qualname__}"


def options_of(kind: type[Any]) -> dict[str, Option]:
    """Return the options of a class by name, in the order of its fields."""
    types = get_type_hints(kind)
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        texts |= _texts(base)
    found = {}
    for each in fields(kind):
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        known = rules() | dict(each.metadata)
        known["flag"] = (known["flag"] or each.name).replace("_", "-")
        found[each.name] = Option(each.name, types[each.name], default, texts.get(each.name, ""), **known)
    return found


def _texts(kind: type) -> dict[str, str]:
    """Return name -> text of the arguments that a docstring lists under "Args:"."""
    _, _, after = inspect.cleandoc(kind.__doc__ or "").partition("\nArgs:\n")
    found: dict[str, str] = {}
    for line in after.splitlines():
        if line.strip() and not line.startswith("    "):
            break
        named = re.match(r"    (\w+): (.*)", line)
        if named:
            found[last := named[1]] = named[2]
        elif line.strip():
            found[last] += f" {line.strip()}"
    return found


@dataclass(frozen=True)
class Options:
    """Base of the frozen dataclasses whose fields are options."""

    KIND: ClassVar[str] = "option"
    """What a message calls one of them."""

    def __post_init__(self) -> None:
        for name, known in options_of(type(self)).items():
            object.__setattr__(self, name, known.checked(getattr(self, name)))

    @classmethod
    def of(cls, given: Self | Mapping[str, Any] | None = None, **named: Any) -> Self:
        """Return options from an object or a mapping, with some replaced by name.

        Args:
            given: options as an object, or name -> value; None for the defaults.
            named: values that replace those in `given`; None replaces nothing.

        Raises:
            OptionError: an unknown name, or a value that is not allowed.
        """
        known = options_of(cls)
        values = {name: getattr(given, name) for name in known} if isinstance(given, Options) else dict(given or {})
        values |= {name: value for name, value in named.items() if value is not None}
        for name in values:
            if name not in known:
                raise unknown(cls.KIND, str(name), known)
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Return the options as plain JSON values, for `of` to read."""
        return {name: _written(getattr(self, name)) for name, known in options_of(type(self)).items() if known.saved}
