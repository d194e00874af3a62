"""Sizes that users give to layers: how many features, heads or rows."""

from __future__ import annotations

import operator
from typing import Any

from shardflax.nn.errors import SizeError, where


def check_sizes(layer: Any, **sizes: Any) -> None:
    """Raises unless each of `sizes`, fields of `layer`, is a whole number from 0 on."""
    for name, size in sizes.items():
        if (type(size) is not int or size < 0) and not _is_size(size):
            raise SizeError(where(layer), name, size)


def _is_size(size: Any) -> bool:
    """What is no plain int: numbers of numpy are sizes, `None`, `2.0` and tuples are not."""
    try:
        return operator.index(size) >= 0
    except TypeError:
        return False
