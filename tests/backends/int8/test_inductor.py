from __future__ import annotations

import pytest
import torch

from fxquant.backends.int8 import FxInt8Backend, compiled
from tests.backends.lowered import example, simulated


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_gives_the_eager_answer_for_the_batch_it_was_compiled_for_and_for_others() -> None:
    lowered = FxInt8Backend().lower(simulated("inverted"), 2)
    call = compiled(lowered)
    with torch.no_grad():
        for count in (2, 5):
            (x,) = example("inverted", count)
            expected = lowered(x)
            assert (call(x) - expected).abs().max() <= 0.02 * expected.abs().max()
