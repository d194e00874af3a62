"""The types that the signatures of layers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import jax
import numpy as np

__all__ = [
    "INTEGERS",
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
INTEGERS = (int, np.integer)  # what counts as one number, in the place of a sequence
Precision = Any
