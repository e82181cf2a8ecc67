"""Networks with more or fewer channels: input channels of layers split in two, or left out."""

from __future__ import annotations

from fxquant.passes.reshaping.drop_channels import drop_channels
from fxquant.passes.reshaping.layer_inputs import Layer, Pair, layers_of, pairs_of
from fxquant.passes.reshaping.new_shape import reshaped
from fxquant.passes.reshaping.shape_program import Chosen, chosen_shapes
from fxquant.passes.reshaping.split_channels import halves, saved_by_splitting, split_channels
from fxquant.passes.reshaping.variants import Variant, variants_of
