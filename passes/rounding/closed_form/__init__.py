"""Closed-form rounding algorithms: one file each, without training."""

from __future__ import annotations

from fxquant.passes.rounding.closed_form.bank import RoundWeights
from fxquant.passes.rounding.closed_form.bias_correction import channel_means
from fxquant.passes.rounding.closed_form.chains import ScaleChain, scale_chains
from fxquant.passes.rounding.closed_form.descent import refined, rescaled_to, swept
from fxquant.passes.rounding.closed_form.gpfq import gpfq_rows, path_following
from fxquant.passes.rounding.closed_form.gptq import gptq_rounder, gptq_rows, with_best_scales
from fxquant.passes.rounding.closed_form.input_gram import (
    GramAccumulator,
    Moments,
    channel_axis,
    geometry_of,
    patches,
    rows_apart,
)
from fxquant.passes.rounding.closed_form.layerwise import (
    moments_of,
    round_layerwise,
)
from fxquant.passes.rounding.closed_form.output_moments import OutputMoments, output_moments
from fxquant.passes.rounding.closed_form.prefix import FEWEST, Prefix, go_to
from fxquant.passes.rounding.closed_form.qronos import DAMPINGS, aimed, refitted
from fxquant.passes.rounding.closed_form.spfq import spfq_rows, stochastic
from fxquant.passes.rounding.closed_form.verdict import first_site, judged, verdict_losses
