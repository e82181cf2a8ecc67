"""Channels of one value scaled to like ranges, in parameters alone: what the network computes stays."""

from __future__ import annotations

from fxquant.passes.equalization.channel_factors import ChannelFactors, channel_factors
from fxquant.passes.equalization.equalize_channels import EqualizeChannels, scaled
from fxquant.passes.equalization.measure_noise import measured_noise
from fxquant.passes.equalization.rounding_noise import RoundingNoise, ValueNoise, WeightNoise, fewest_noise

__all__ = [
    "ChannelFactors",
    "EqualizeChannels",
    "RoundingNoise",
    "ValueNoise",
    "WeightNoise",
    "channel_factors",
    "fewest_noise",
    "measured_noise",
    "scaled",
]
