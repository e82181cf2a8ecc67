from __future__ import annotations

from typing import Any

import fxquant
from fxquant.core.ir import Choice
from fxquant.report import layer_rows, operand_rows
from tests.small import images, small, small_result


def layer(name: str, choice: str, **losses: float) -> dict[str, Any]:
    return {"name": name, "choice": choice, "losses": losses}


def test_each_operand_beside_the_widest_of_the_other() -> None:
    rows = operand_rows(
        [
            layer("stem", "W4A4", W4A4=7.0, W4A8=5.0, W8A4=3.0, W8A8=1.0, float=0.0),
            layer("body", "W8A8", W4A4=7.0, W4A8=5.0, W8A4=3.0, W8A8=1.0),
            layer("tail", "W2A4", W2A4=9.0, W4A8=5.0),
        ]
    )
    assert rows == [
        {"name": "stem", "choice": "W4A4", "both": 7.0, "weights": 5.0, "activations": 3.0},
        {"name": "body", "choice": "W8A8", "both": 1.0, "weights": 1.0, "activations": 1.0},
        {"name": "tail", "choice": "W2A4", "both": 9.0, "weights": None, "activations": None},
    ]


def test_layers_of_one_activation_width_and_in_float_have_no_row() -> None:
    assert operand_rows([layer("a", "W4A8", W2A8=2.0, W4A8=1.0), layer("b", "float", W4A4=1.0, W4A8=2.0)]) == []
    assert operand_rows(layer_rows(small_result().program)) == []


def test_losses_are_those_of_the_matrix() -> None:
    result = fxquant.quantize(
        small(),
        images(),
        fxquant.Budget(average_bits=5),
        bits=(4, 8),
        activation_bits=(4, 8),
        target="reference",
        effort="fast",
        progress=False,
    )
    matrix = result.sensitivity
    alone = {(c.site, c.choice): matrix.values[k, k] for k, c in enumerate(matrix.candidates)}
    rows = operand_rows(layer_rows(result.program))
    assert [row["name"] for row in rows] == ["stem", "body", "head"]
    for row in rows:
        chosen = result.allocation.choices[row["name"]]
        assert row["weights"] == alone[row["name"], Choice(chosen.weight_bits, 8)]
        assert row["activations"] == alone[row["name"], Choice(8, chosen.activation_bits)]
        assert row["both"] == alone[row["name"], chosen]
