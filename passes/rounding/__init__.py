"""Rounding algorithms: closed forms and learned ones, each a function from a `RoundingTask` to a program."""

from __future__ import annotations

from fxquant.passes.rounding import nearest
from fxquant.passes.rounding.acceptance import accepted, decisive, least, rejection
from fxquant.passes.rounding.closed_form import bias_correction, equalize, gpfq, gptq, qronos, spfq
from fxquant.passes.rounding.learned import profiles
from fxquant.passes.rounding.registry import ROUNDERS, RoundingTask
