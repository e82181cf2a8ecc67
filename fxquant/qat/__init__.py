"""Quantization-aware training: from a simulated graph to a trainable one and back."""

from __future__ import annotations

from fxquant.qat.loop import distill_step, parameter_groups, reestimate
from fxquant.qat.training_graph import METHOD, TrainedValues, gather, trainable, with_values
