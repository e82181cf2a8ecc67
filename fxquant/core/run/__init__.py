"""Running a graph or a part of it: calibration data, replay of a changed suffix, spans, losses, observers."""

from __future__ import annotations

from fxquant.core.run.answer_graph import answer_graph, answer_parts, find_answers
from fxquant.core.run.answer_quality import NO_LABELS, SPARE, keeps, learned_share, needed, quality
from fxquant.core.run.confidence_bounds import drop_bound, images_needed, mean_bound, share_bound
from fxquant.core.run.convolutions import channels_last, clips_behind
from fxquant.core.run.data import LARGEST, WRAP, CalibrationSet, collect
from fxquant.core.run.default_losses import answer_loss
from fxquant.core.run.discrete_answers import Jump, behind_orders, discrete_answers, leading_names, op_name, returned
from fxquant.core.run.footprint import Footprint, live_bytes, storages
from fxquant.core.run.judging import can_mix, judging_images, mixed, moved
from fxquant.core.run.losses import LOSSES, UNITS, VALUES_ONLY, Loss, LossFunction
from fxquant.core.run.model_inputs import images_for
from fxquant.core.run.observers import (
    DENSE_LIMIT,
    OBSERVERS,
    MinMaxObserver,
    MovingAverageObserver,
    MseObserver,
    Observer,
    PercentileObserver,
)
from fxquant.core.run.patch_router import PatchRouter, gradient_magnitude
from fxquant.core.run.replay import (
    Environment,
    GraphReplay,
    first_tensor,
    model_outputs,
)
from fxquant.core.run.runner import Runner, Substitution, dependents, placeholders, varying_nodes
from fxquant.core.run.spans import Span, cut_out, cut_span, is_quantizer, is_size, is_tensor
from fxquant.core.run.task_losses import JOIN, first_output, loss_of
