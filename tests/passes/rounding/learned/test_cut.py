from __future__ import annotations

from fxquant.core.facts import BitAllocation
from fxquant.core.ir import Sites
from fxquant.passes import InsertFakeQuant
from fxquant.passes.rounding.learned import Cut, answer_of, feature_of, find_units
from tests.programs import calibrated, uniform


def test_a_suffix_returns_what_is_asked_for_and_the_last_unit_has_none() -> None:
    program = calibrated("residual")
    simulated = InsertFakeQuant(round_biases=False)(program.with_facts(BitAllocation(uniform(program, 4))))
    module, sites = simulated.module, program[Sites].sites
    assert (answer_of(module), feature_of(module, sites)) == ("linear", "quantize_mean")
    assert feature_of(module, sites[:1]) is None
    units = find_units(module, sites)
    first, last = (Cut(module, units, index, ("linear", "quantize_mean")) for index in (0, len(units) - 1))
    assert first.suffix is not None
    assert set(first.suffix.outputs) == {"linear", "quantize_mean"}
    assert first.computes("linear")
    assert last.suffix is None
    assert last.computes("linear")
    assert not last.computes(units[0].outputs[0])
    assert not last.computes(None)
