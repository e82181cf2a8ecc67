from __future__ import annotations

import pytest

from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation
from fxquant.core.ir import Choice, Sites
from fxquant.core.run import CalibrationSet
from fxquant.core.storage import ScoreStore
from fxquant.passes.sensitivity import Scorer, refuse_context
from tests.scoring import inputs, simulated


def test_a_context_is_refused_by_name_with_a_way_out() -> None:
    program, images = simulated("plain"), CalibrationSet(inputs("plain", 2))
    plan = BitAllocation({site.name: Choice(4, 8) for site in program[Sites].sites})
    refuse_context(Scorer(program, images, "kl", ScoreStore(None, {})), "fit")
    with pytest.raises(OptionError, match=r"'fit' is defined around the float network only; .* 'gram'"):
        refuse_context(Scorer(program, images, "kl", ScoreStore(None, {}), context=plan), "fit")
