"""A target described in a small JSON file, for an accelerator that fxquant does not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.facts.target import LatencyRow, Target
from fxquant.core.ir import OPS
from fxquant.core.storage import read_json, write_json

FORMAT_VERSION = 1
SUFFIX = ".json"
"""End of a target's name by which it is known to be a file."""
GRANULARITY = {"per_channel": True, "per_tensor": False}
REQUIRED = ("name", "kernels", "weight_bits", "activation_bits")
PROXY = "simulation"
"""Backend that runs a target whose file names none."""


def read_target(path: Path) -> Target:
    """Return the target that a file describes.

    Raises:
        FileFormatError: missing, not JSON, or not a target file.
        OptionError: an unknown field, kind of op, width or granularity; the message names what is allowed.
    """
    document = read_json(path, "target", FORMAT_VERSION)
    fields_known = _readers()
    unknown = sorted(set(document) - set(fields_known) - {"kind", "version"})
    missing = [name for name in REQUIRED if name not in document]
    if unknown or missing:
        wrong = f"has unknown fields {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
        raise OptionError(f"{path} {wrong}; allowed: {', '.join(fields_known)}; needed: {', '.join(REQUIRED)}")
    try:
        values = {name: reader(document[name]) for name, reader in fields_known.items() if name in document}
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise FileFormatError(f"{path} is not an intact target file ({type(error).__name__}: {error})") from error
    for name, allowed in _kinds_of_ops().items():
        strange = sorted(set(values.get(name, ())) - allowed)
        if strange:
            raise OptionError(f"{path}: {name} names {', '.join(strange)}; known kinds: {', '.join(sorted(allowed))}")
    if "granularity" in values:
        values["per_channel"] = values.pop("granularity")
    values.setdefault("joins", frozenset())
    values.setdefault("storage_bits", {bits: bits for bits in values["weight_bits"]})
    values.setdefault("runs_on", PROXY)
    return Target(**values)


def _kinds_of_ops() -> dict[str, set[str]]:
    """Return field -> kinds of ops it may name."""
    return {
        "kernels": {rule.kind for rule in OPS.values() if rule.macs is not None},
        "joins": {rule.kind for rule in OPS.values() if rule.macs is None},
    }


def target_to_json(target: Target) -> dict[str, Any]:
    """Return what a file of this target says, as plain JSON values."""
    granularity = next(name for name, per_channel in GRANULARITY.items() if per_channel == target.per_channel)
    body: dict[str, Any] = {"granularity": granularity, "runs_on": target.runner}
    for field in fields(Target):
        value = getattr(target, field.name)
        if field.name == "latency":
            body["latency"] = [{f.name: getattr(row, f.name) for f in fields(LatencyRow)} for row in value]
        elif field.name not in ("per_channel", "runs_on"):
            body[field.name] = sorted(value) if isinstance(value, frozenset) else _plain(value)
    return body


def write_target(path: Path, target: Target) -> None:
    """Write what `read_target` reads.

    Raises:
        OutputError: the path cannot be written.
    """
    write_json(path, "target", FORMAT_VERSION, target_to_json(target))


def _plain(value: Any) -> Any:
    return {str(key): inner for key, inner in value.items()} if isinstance(value, Mapping) else value


def _widths(value: Any) -> tuple[int, ...]:
    return tuple(sorted({_integer(bits) for bits in _list(value)}))


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str) or (isinstance(value, str) and not value.isdigit()):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list")
    return value


def _texts(value: Any) -> dict[str, str]:
    return {str(key): str(text) for key, text in value.items()}


def _storage(value: Any) -> dict[int, int]:
    return {_integer(bits): _integer(stored) for bits, stored in value.items()}


def _kinds(value: Any) -> frozenset[str]:
    return frozenset(str(kind) for kind in _list(value))


def _granularity(value: Any) -> bool:
    if value not in GRANULARITY:
        raise ValueError(f"granularity {value!r}; allowed: {', '.join(GRANULARITY)}")
    return GRANULARITY[value]


def _rows(value: Any) -> tuple[LatencyRow, ...]:
    known = [field.name for field in fields(LatencyRow)]
    rows = []
    for row in _list(value):
        strange = sorted(set(row) - set(known))
        if strange:
            raise ValueError(f"a latency row has {', '.join(map(str, strange))}; allowed: {', '.join(known)}")
        numbers = {name: float(row[name]) for name in known[2:] if name in row}
        rows.append(LatencyRow(str(row["layers"]), str(row["precision"]), **numbers))
    return tuple(rows)


def _readers() -> dict[str, Any]:
    """Return field -> what makes its value of JSON."""
    return {
        "name": str,
        "kernels": _texts,
        "joins": _kinds,
        "weight_bits": _widths,
        "weight_formats": lambda kinds: tuple(sorted(_kinds(kinds))),
        "activation_bits": _widths,
        "storage_bits": _storage,
        "activation_storage_bits": _storage,
        "output_quantized": _kinds,
        "fused_sums": _kinds,
        "refuse_joins": _texts,
        "products": _kinds,
        "granularity": _granularity,
        "latency": _rows,
        "runs_on": str,
    }
