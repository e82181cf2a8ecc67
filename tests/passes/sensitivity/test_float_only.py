from __future__ import annotations

import pytest

from fxquant.core.allocation import BitAllocation
from fxquant.core.data import CalibrationSet
from fxquant.core.errors import OptionError
from fxquant.core.score_store import ScoreStore
from fxquant.core.spec import Choice, Sites
from fxquant.passes.sensitivity.float_only import refuse_context
from fxquant.passes.sensitivity.scorer import Scorer
from tests.scoring import inputs, simulated


def test_a_context_is_refused_by_name_with_a_way_out() -> None:
    program, images = simulated("plain"), CalibrationSet(inputs("plain", 2))
    plan = BitAllocation({site.name: Choice(4, 8) for site in program[Sites].sites})
    refuse_context(Scorer(program, images, "kl", ScoreStore(None, {})), "fit")
    with pytest.raises(OptionError, match=r"'fit' is defined around the float network only; .* 'gram'"):
        refuse_context(Scorer(program, images, "kl", ScoreStore(None, {}), context=plan), "fit")
