from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.facts import LatencyRow, Target, read_target, target_to_json, write_target

DOCUMENT: dict[str, Any] = {
    "kind": "target",
    "version": 1,
    "name": "npu",
    "kernels": {"conv": "npu_conv", "linear": "npu_gemm"},
    "joins": ["add"],
    "weight_bits": [4, 8],
    "activation_bits": [8],
    "granularity": "per_tensor",
    "latency": [
        {"layers": "type:conv", "precision": "W4A8", "ms_per_million_macs": 0.5},
        {"layers": "*", "precision": "*", "ms": 1.0},
    ],
}


def written(folder: Path, **changes: Any) -> Path:
    """Return the path of the document with these fields changed; None leaves one out."""
    body = {key: value for key, value in {**DOCUMENT, **changes}.items() if value is not None}
    path = folder / "npu.json"
    path.write_text(json.dumps(body))
    return path


def test_a_short_file_says_what_a_target_needs(tmp_path: Path) -> None:
    assert read_target(written(tmp_path)) == Target(
        name="npu",
        kernels={"conv": "npu_conv", "linear": "npu_gemm"},
        joins=frozenset({"add"}),
        weight_bits=(4, 8),
        activation_bits=(8,),
        storage_bits={4: 4, 8: 8},
        per_channel=False,
        latency=(LatencyRow("type:conv", "W4A8", ms_per_million_macs=0.5), LatencyRow("*", "*", ms=1.0)),
        runs_on="simulation",
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    target = Target(
        name="other",
        kernels={"conv": "c"},
        joins=frozenset({"add", "cat"}),
        weight_bits=(2, 8),
        activation_bits=(4, 8),
        storage_bits={2: 4, 8: 8},
        output_quantized=frozenset({"conv"}),
        fused_sums=frozenset({"conv"}),
        refuse_joins={"mul": "no"},
        activation_storage_bits={4: 4},
        products=frozenset({"matmul"}),
        runs_on="reference",
    )
    write_target(tmp_path / "t.json", target)
    again = read_target(tmp_path / "t.json")
    assert again == target
    assert target_to_json(again) == target_to_json(target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": {}}, "unknown fields kernel; allowed: name, kernels"),
        ({"weight_bits": None}, "lacks weight_bits"),
        ({"kernels": {"conv3": "x"}}, "kernels names conv3; known kinds: .*conv.*linear"),
        ({"joins": ["conv"]}, "joins names conv; known kinds: add"),
        ({"granularity": "per_group"}, "granularity 'per_group'; allowed: per_channel, per_tensor"),
        ({"weight_bits": [4.5]}, "4.5 is no whole number"),
        ({"weight_bits": 8}, "8 is no list"),
        ({"storage_bits": {"4": 2, "8": 8}}, "stores 4-bit weights in 2 bits"),
        ({"latency": [{"layers": "*", "precision": "*"}]}, "give numbers of at least 0, one of them above"),
        ({"latency": [{"layers": "*", "precision": "*", "ms": -1}]}, "give numbers of at least 0"),
        ({"latency": [{"layers": "*", "precision": "*", "milliseconds": 1}]}, "has milliseconds; allowed: layers"),
        ({"latency": [{"precision": "*", "ms": 1}]}, "layers"),
        ({"latency": [7]}, "not an intact target file"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((OptionError, FileFormatError), match=message):
        read_target(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({}, (4, 8)),
        ({"weight_bits": [2, 3, 4, 8]}, (2, 4, 8)),
        ({"weight_formats": ["codebook"]}, ("2c", "3c", 4, 8)),
        ({"weight_bits": [5]}, (5,)),
    ],
)
def test_candidates_by_default_are_those_it_executes(
    changes: dict[str, Any], bits: tuple[int | str, ...], tmp_path: Path
) -> None:
    assert read_target(written(tmp_path, **changes)).default_bits == bits
