"""Metadata of dims, by Linen's names: boxes in general, and those that mean sharding."""

from __future__ import annotations

from shardflax.core.meta import (
    AxisMetadata,
    add_axis,
    is_axis_metadata,
    map_axis_meta,
    remove_axis,
    replace_boxed,
    unbox,
)
from shardflax.partitioning import (
    PARTITION_NAME,
    Partitioned,
    get_partition_spec,
    get_sharding,
    with_partitioning,
)

__all__ = [
    "PARTITION_NAME",
    "AxisMetadata",
    "Partitioned",
    "add_axis",
    "get_partition_spec",
    "get_sharding",
    "is_axis_metadata",
    "map_axis_meta",
    "remove_axis",
    "replace_boxed",
    "unbox",
    "with_partitioning",
]
