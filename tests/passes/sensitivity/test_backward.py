from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxquant.core.facts import BitAllocation
from fxquant.core.ir import Choice, Sites
from fxquant.core.run import CalibrationSet
from fxquant.core.storage import ScoreStore
from fxquant.passes.sensitivity import Batch, RoundedWeight, Scorer, Tape
from tests.scoring import inputs, scorer, simulated


def directional(each: Scorer, batch: Batch, column: int, cotangent: Tensor, step: float) -> Tensor:
    """v . (answer at the context plus a small part of the column's shift), differenced, image by image."""
    base, names = each.base(batch), each.columns[column].substitution
    moved: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, replacement in names.items():
        node = each.replay.by_name[name]
        source, standing = base.environment[node.all_input_nodes[0]], base.environment[node]
        delta = replacement(source) - standing
        moved[name] = (
            RoundedWeight(standing + step * delta) if isinstance(replacement, RoundedWeight) else _shifted(step * delta)
        )
    with torch.no_grad():
        answer, _ = each.replay.replay(base.environment, {**each.in_context, **moved}, changed=moved)
    return (cotangent * (answer - base.answer)).flatten(1).sum(1).double() / step


def _shifted(delta: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x + delta


@pytest.mark.parametrize("widths", [(8,), (4, 8)])
@pytest.mark.parametrize("name", ["plain", "shared", "residual", "two_inputs"])
def test_responses_are_directional_derivatives(name: str, widths: tuple[int, ...]) -> None:
    images = CalibrationSet(inputs(name, 5))
    each = scorer(simulated(name, (2, 4, 8), widths), images)
    batch = Batch(0, images)
    tape = Tape(each, batch)
    cotangent = torch.randn(tape.answer.shape, generator=torch.Generator().manual_seed(1))
    found = tape.responses([tape.gradients(cotangent)])[0]
    # A step this small crosses few kinks of ReLU, and is large against float32 round-off of the answer.
    expected = torch.stack([directional(each, batch, k, cotangent, 1e-3) for k in range(len(each.columns))])
    scale = expected.abs().max()
    close = (found - expected).abs() < 2e-2 * expected.abs() + 3e-3 * scale
    assert close.double().mean() > 0.97
    assert (found - expected).abs().max() < 0.2 * scale


def test_around_a_plan_the_standing_weights_do_not_move() -> None:
    program, images = simulated("plain"), CalibrationSet(inputs("plain", 4))
    plan = BitAllocation({site.name: Choice(4, 8) for site in program[Sites].sites})
    each = Scorer(program, images, "kl", ScoreStore(None, {}), context=plan)
    tape = Tape(each, Batch(0, images))
    found = tape.responses([tape.gradients(torch.ones_like(tape.answer))])[0]
    own = torch.tensor([column.weight_bits == 4 for column in each.columns])
    assert not found[own].any()
    assert found[~own].any()


def test_work_is_counted() -> None:
    images = CalibrationSet(inputs("plain", 4))
    each = scorer(simulated("plain"), images)
    tape = Tape(each, Batch(0, images))
    assert each.take_spent(1) == pytest.approx(1)
    gradients = tape.gradients(torch.ones_like(tape.answer))
    assert each.take_spent(1) == pytest.approx(1)
    tape.responses([gradients, gradients])
    # Three widths: each op runs three times, however many cotangents there are.
    assert 1.5 < each.take_spent(1) < 3
