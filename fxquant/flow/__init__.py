"""The flow from a captured program to a plan: pipeline, allocation under limits, rounding."""

from __future__ import annotations

from fxquant.flow.allocate import check_budget, impose
from fxquant.flow.cheapest import choose
from fxquant.flow.curve import measure_curve
from fxquant.flow.file_size import measure_file
from fxquant.flow.judged_factors import equalize
from fxquant.flow.judged_images import (
    check_answers,
    check_labels,
    check_training,
    learned_note,
    most_images,
    split_images,
    taken_images,
)
from fxquant.flow.latency import measure_latency
from fxquant.flow.other_channels import changes_channels, check_channels, new_channels, noted
from fxquant.flow.pipeline import KNOWN_NAMES, Pipeline, calibrate, check_names, find_sites, prepare, run
from fxquant.flow.round_weights import algorithms, realised, round_plan, round_with_feedback, rounded_best
from fxquant.flow.routing import check_limits, check_routes, most_hard, split, with_routes
from fxquant.flow.score import answer_note, judged_on, loss_in_use, measure_sensitivity, score_identity
from fxquant.flow.stages import CAPTURE, CURVE, SCORE, stages
from fxquant.flow.train_plan import finished, trained
from fxquant.flow.within_reach import calibrate_within
