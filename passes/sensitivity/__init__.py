"""Sensitivity estimators: one file each, all behind one `SensitivityMatrix`."""

from __future__ import annotations

from fxquant.passes.sensitivity import (
    coverage,
    diagonal,
    fisher,
    fisher_out,
    fit,
    gram,
    gram_shrunk,
    hawq,
    hybrid,
    limpq,
    monotone,
    mpqco,
    orm,
    pairs,
    path,
    separability,
    shrunk,
    sqnr,
    weight_mse,
)
from fxquant.passes.sensitivity.backward import Tape
from fxquant.passes.sensitivity.cell_sweep import Cell, Memory, Work, sweep
from fxquant.passes.sensitivity.columns import Column, Replacements, RoundedWeight, columns_of
from fxquant.passes.sensitivity.cotangents import generator, image_generators, loss_gradient, stream_of
from fxquant.passes.sensitivity.coverage import coverage_pairs, link
from fxquant.passes.sensitivity.expected_time import expected_seconds
from fxquant.passes.sensitivity.hawq import probe
from fxquant.passes.sensitivity.layer_features import jackknife_error, layer_features
from fxquant.passes.sensitivity.leaves import Leaves, activation_noise, rounded_values, weight_noise
from fxquant.passes.sensitivity.limpq import rising_to_narrow
from fxquant.passes.sensitivity.monotone import falling, monotone_pairs, repair
from fxquant.passes.sensitivity.mpqco import label_cotangents
from fxquant.passes.sensitivity.orm import orthogonality, unbiased_hsic
from fxquant.passes.sensitivity.pair_choice import choose_pairs, slope, suffix_cost
from fxquant.passes.sensitivity.pairs import PairRuns, positive_part
from fxquant.passes.sensitivity.path import attribution
from fxquant.passes.sensitivity.registry import ESTIMATORS, Estimate, Estimator, estimator
from fxquant.passes.sensitivity.scorer import Batch, Scorer
from fxquant.passes.sensitivity.separability import tf_idf
from fxquant.passes.sensitivity.shrunk import shrunk_pairs
from fxquant.passes.sensitivity.singles import measure_singles
from fxquant.passes.sensitivity.walk import formats, walk
from fxquant.passes.sensitivity.weight_mse import mean_square, relative_error
