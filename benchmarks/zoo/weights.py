"""Loads an npz state dict of the data folder into a network, refusing any key that does not fit."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from benchmarks.data import read_arrays
from fxquant.core.errors import FileFormatError

Net = TypeVar("Net", bound=nn.Module)


def loaded(model: Net, relative: str) -> Net:
    """Return `model` in eval mode with the float32 weights of one file of the data folder.

    Raises:
        FileFormatError: the file is missing, or its keys are not those of the network.
    """
    state = {key: torch.from_numpy(array).float() for key, array in read_arrays(relative).items()}
    result = model.load_state_dict(state, strict=False)
    # The files leave out BatchNorm's step counters, which inference never reads.
    missing = [key for key in result.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or result.unexpected_keys:
        raise FileFormatError(
            f"{relative} does not fit {type(model).__name__}: missing {missing}, "
            f"unexpected {result.unexpected_keys}; the definition must use the file's keys"
        )
    return model.eval()
