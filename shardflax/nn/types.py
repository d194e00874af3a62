"""The types that the signatures of layers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import jax

__all__ = [
    "Array",
    "Axes",
    "DotGeneral",
    "Dtype",
    "Initializer",
    "Names",
    "Padding",
    "Precision",
    "Shape",
]

Array = jax.Array
Dtype = Any
Shape = Sequence[int]
Axes = int | Sequence[int]
Names = tuple[str | EllipsisType | None, ...]
Initializer = Callable[..., Any]
DotGeneral = Callable[..., Array]
Padding = str | int | Sequence[int | tuple[int, int]]
Precision = Any
