"""What models return, brought to what a graph returns: tensors in tuples and dictionaries, the answer first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.core.errors import CaptureError

ANSWER = "logits"
"""Entry of a dictionary that is the answer, wherever it is in the dictionary."""


def plain_answer(output: Any) -> Any:
    """Return a model's output without dataclasses, and with an entry `logits` in front of the others.

    The first tensor of an output is what losses compare and runtimes are checked by. A dataclass or named tuple becomes
    a dictionary of its fields, which can be stored; those that torch knows, as the outputs of Hugging Face models are,
    stay what they are.

    Args:
        output: tensor, tuple, list, dictionary or dataclass of such, with numbers, texts and None among them.

    Raises:
        CaptureError: it holds an object of another kind, or no tensor.
    """
    made = _plain(output)
    leaves = torch.utils._pytree.tree_leaves(made)
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, Tensor | int | float | str):
            raise CaptureError(
                f"the model returns a {type(leaf).__name__}, whose tensors a graph cannot tell; "
                "return tensors, or a tuple, dictionary or dataclass of them"
            )
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise CaptureError(
            f"the model returns {type(output).__name__} without a tensor; return its logits, alone or in a dictionary"
        )
    return made


def _plain(value: Any) -> Any:
    if is_dataclass(value) and type(value) not in torch.utils._pytree.SUPPORTED_NODES:
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if type(value) in (dict, OrderedDict):
        order = sorted(value, key=lambda name: not (name == ANSWER and isinstance(value[name], Tensor)))
        return type(value)((name, _plain(value[name])) for name in order)
    return type(value)(map(_plain, value)) if type(value) in (tuple, list) else value
