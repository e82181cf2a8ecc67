"""Learned rounding: unit-wise reconstruction (AdaRound, BRECQ, QDrop, PD-Quant)."""

from __future__ import annotations

from fxquant.passes.rounding.learned.adaround import ADAROUND
from fxquant.passes.rounding.learned.asymmetric import POWER, asymmetric_grid, with_asymmetric_weights
from fxquant.passes.rounding.learned.brecq import BRECQ
from fxquant.passes.rounding.learned.correction import EPSILON, corrected, has_statistics, mismatch
from fxquant.passes.rounding.learned.cut import Cut, answer_of, feature_of
from fxquant.passes.rounding.learned.engine import Reconstructor, reconstruct
from fxquant.passes.rounding.learned.options import Reconstruction
from fxquant.passes.rounding.learned.outcome import Constant, Outcome, Quantizers
from fxquant.passes.rounding.learned.pdquant import FAITHFUL, FAST, PDQUANT, SECOND_STAGE, VIT
from fxquant.passes.rounding.learned.qdrop import QDROP
from fxquant.passes.rounding.learned.quantizers import LearnedActivation, SoftRounding, StraightThrough, random_mask
from fxquant.passes.rounding.learned.sources import RUN, Source, kept_bytes, kept_type
from fxquant.passes.rounding.learned.tune import Material, Pieces, Tuner, channel_sums, relative_error, softened_kl
from fxquant.passes.rounding.learned.units import LARGEST, Unit, find_units

__all__ = [
    "ADAROUND",
    "BRECQ",
    "EPSILON",
    "FAITHFUL",
    "FAST",
    "LARGEST",
    "PDQUANT",
    "POWER",
    "QDROP",
    "RUN",
    "SECOND_STAGE",
    "VIT",
    "Constant",
    "Cut",
    "LearnedActivation",
    "Material",
    "Outcome",
    "Pieces",
    "Quantizers",
    "Reconstruction",
    "Reconstructor",
    "SoftRounding",
    "Source",
    "StraightThrough",
    "Tuner",
    "Unit",
    "answer_of",
    "asymmetric_grid",
    "channel_sums",
    "corrected",
    "feature_of",
    "find_units",
    "has_statistics",
    "kept_bytes",
    "kept_type",
    "mismatch",
    "random_mask",
    "reconstruct",
    "relative_error",
    "softened_kl",
    "with_asymmetric_weights",
]
