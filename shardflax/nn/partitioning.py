"""Rules for logical names, under the name that programs before Linen's boxes import them by.

>>> from shardflax.nn import partitioning as nn_partitioning
>>> with nn_partitioning.axis_rules([("embed", "data"), ("mlp", "model")]):
...     nn_partitioning.logical_to_mesh_axes(("embed", "mlp"))
P('data', 'model')
"""

from __future__ import annotations

from shardflax.core import remat
from shardflax.partitioning import RulesFallback, logical_to_mesh_axes
from shardflax.partitioning import get_logical_axis_rules as get_axis_rules
from shardflax.partitioning import logical_axis_rules as axis_rules
from shardflax.partitioning import set_logical_axis_rules as set_axis_rules
from shardflax.partitioning import with_logical_constraint as with_sharding_constraint

__all__ = [
    "RulesFallback",
    "axis_rules",
    "get_axis_rules",
    "logical_to_mesh_axes",
    "remat",
    "set_axis_rules",
    "with_sharding_constraint",
]
