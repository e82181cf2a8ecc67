from __future__ import annotations

import pytest
import torch

from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity import ESTIMATORS, Batch, Tape, label_cotangents
from tests.scoring import inputs, plain_net, scorer, simulated

fisher_out = ESTIMATORS["fisher_out"]


@pytest.mark.parametrize(("name", "owner"), [("attention", "tie matmul_1"), ("plain", "tie relu")])
def test_values_count_at_the_layers_that_read_them_or_where_they_stand(name: str, owner: str) -> None:
    images = CalibrationSet(inputs(name, 4))
    each = scorer(simulated(name, (8,), (4, 8)), images)
    values = fisher_out.measure(each).values
    tape = Tape(each, Batch(0, images))
    gradients = tape.gradients(label_cotangents(each, Batch(0, images), tape.reference))
    index = next(k for k, column in enumerate(each.columns) if column.owner == owner and column.activation_bits == 4)
    ((node, replacement),) = each.columns[index].substitution.items()
    x = tape.environment[each.replay.by_name[node]].detach()
    shift = replacement(x) - x
    if name == "plain":
        weights = {"conv2": plain_net().conv2.weight.detach(), "conv3": plain_net().conv3.weight.detach()}
        terms = {tape.ops[site][0].name: torch.nn.functional.conv2d(shift, weights[site]) for site in weights}
    else:
        terms = {node: shift}
    squares = sum(float((gradients[place] * moved).double().square().sum()) for place, moved in terms.items())
    assert values[index, index] == pytest.approx(squares / 4 / 2, rel=1e-3)
