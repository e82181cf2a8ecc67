"""Capture: a trained model in, a `Program` (functional ATen graph) out."""

from __future__ import annotations

from fxquant.capture.decompositions import DECOMPOSITIONS
from fxquant.capture.forward_arguments import input_names
from fxquant.capture.model_outputs import plain_answer
from fxquant.capture.trace import capture
from fxquant.capture.weights import check_finite, check_storage
