"""All norms in one place, as Linen has them."""

from __future__ import annotations

from shardflax.nn.batch_norm import BatchNorm
from shardflax.nn.group_norm import GroupNorm, InstanceNorm
from shardflax.nn.layer_norm import LayerNorm, RMSNorm
from shardflax.nn.weight_norm import SpectralNorm, WeightNorm

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "SpectralNorm",
    "WeightNorm",
]
