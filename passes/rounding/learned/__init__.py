"""Learned rounding: unit-wise reconstruction (AdaRound, BRECQ, QDrop, PD-Quant)."""

from __future__ import annotations

from fxquant.passes.rounding.learned.activation_starts import activation_starts
from fxquant.passes.rounding.learned.asymmetric import POWER, asymmetric_grid, with_asymmetric_grids
from fxquant.passes.rounding.learned.certainty import where_it_pays
from fxquant.passes.rounding.learned.correction import EPSILON, corrected_inputs, has_statistics, mismatch
from fxquant.passes.rounding.learned.cut import Cut, answer_of, feature_of
from fxquant.passes.rounding.learned.engine import Reconstructor, reconstruct
from fxquant.passes.rounding.learned.options import Reconstruction
from fxquant.passes.rounding.learned.outcome import DecidedBias, DecidedWeight, Outcome
from fxquant.passes.rounding.learned.profiles import PROFILES
from fxquant.passes.rounding.learned.quantizers import (
    LearnedActivation,
    SoftRounding,
    StraightThrough,
    random_mask,
)
from fxquant.passes.rounding.learned.schedule import affordable
from fxquant.passes.rounding.learned.sources import RUN, Source, kept_bytes, kept_type
from fxquant.passes.rounding.learned.tune import (
    BETA,
    MIX,
    Draw,
    Material,
    Pieces,
    Tuner,
    channel_sums,
)
from fxquant.passes.rounding.learned.unit_quantizers import Chosen, UnitQuantizers
from fxquant.passes.rounding.learned.unit_verdict import HARM, Judged, UnitVerdict
from fxquant.passes.rounding.learned.units import LARGEST, Unit, find_units
