"""Settings of the whole test run."""

from __future__ import annotations

import os

import torch

# The networks of the tests are tiny: a second thread only waits for the first, and on a busy machine for long.
torch.set_num_threads(1)
# No test may read what another run measured, or leave anything in the user's folders.
os.environ["FXQUANT_CACHE"] = "off"
