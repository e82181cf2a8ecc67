from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from fxquant.backends.int8 import FxInt8Backend, compiled
from tests.backends.lowered import example, simulated


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_graph_gives_the_eager_answer_for_the_batch_it_was_compiled_for_and_for_others() -> None:
    torch._dynamo.reset()
    counters.clear()
    # One image: its linear layer has a single row, whose strides Inductor leaves at 0.
    lowered = FxInt8Backend().lower(simulated("inverted"), 1)
    call = compiled(lowered)
    with torch.no_grad():
        for count in (1, 5):
            (x,) = example("inverted", count)
            expected = lowered(x)
            assert (call(x) - expected).abs().max() <= 0.02 * expected.abs().max()
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
