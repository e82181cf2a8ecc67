"""Quantization-aware training: simulated graphs to train and back, and the trainers of published methods."""

from __future__ import annotations

from fxquant.qat import aqd, bsq, distill, dropbits, training_loop
from fxquant.qat.bit_planes import BitPlanes
from fxquant.qat.cluster_promoting import ClusterPromoting, nearest_of_level, probability
from fxquant.qat.distill import aim
from fxquant.qat.loop import distill_step, parameter_groups, reestimate
from fxquant.qat.narrowing import Ladders
from fxquant.qat.trainer import TRAINERS, Trainer, Training, TrainingTask, check_count, training_options
from fxquant.qat.training_graph import METHOD, TrainedValues, gather, simulated_plan, trainable, with_values
