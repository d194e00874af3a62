"""A model of two hundred parameters, one name of which is misspelt: what has to be refused.

Tests look at how, and `benchmarks/layouts.py` at how quickly.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import shardflax.nn as nn

__all__ = ["Deep", "model"]


class Deep(nn.Module):
    """A hundred layers of two parameters; `layers_57` says `emebd` for `embed`."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for i in range(100):
            names = ("emebd", "mlp") if i == 57 else ("embed", "mlp")
            x = nn.Dense(16, kernel_axes=names, name=f"layers_{i}")(x)
        return x


def model() -> tuple[Deep, jax.ShapeDtypeStruct]:
    """The model, and the shape of its input.

    >>> model()[1].shape
    (8, 16)
    """
    return Deep(), jax.ShapeDtypeStruct((8, 16), jnp.float32)
