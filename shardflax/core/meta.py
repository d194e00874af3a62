"""Metadata of dims, by Linen's names: what the core has of it.

The boxes that mean sharding (`Partitioned`, `with_partitioning`, ...) are in `shardflax.nn.meta`,
together with these: the core knows no mesh.
"""

from __future__ import annotations

from shardflax.core.boxes import AxisMetadata, add_axis, remove_axis, unbox
from shardflax.core.boxes import is_box as is_axis_metadata
from shardflax.core.boxes import map_boxes as map_axis_meta
from shardflax.core.boxes import rebox as replace_boxed

__all__ = [
    "AxisMetadata",
    "add_axis",
    "is_axis_metadata",
    "map_axis_meta",
    "remove_axis",
    "replace_boxed",
    "unbox",
]
