"""Layers that draw random numbers at each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from shardflax.core import Module, compact
from shardflax.nn.errors import DropoutRateError, MergeParamError, where
from shardflax.nn.general import canonical_dims
from shardflax.nn.types import Array
from shardflax.partitioning.explicit_out import laid_out_like

__all__ = ["Dropout", "merge_param"]


def merge_param(name: str, a: Any, b: Any) -> Any:
    """The one of `a` and `b` that is not `None`: an argument of the layer or of the call.

    Both or neither is a `MergeParamError`.

    >>> merge_param("deterministic", None, True)
    True
    """
    if (a is None) == (b is None):
        raise MergeParamError(name, 0 if a is None else 2)
    return b if a is None else a


class Dropout(Module):
    """Sets each element to 0 with probability `rate` and scales the rest by `1 / (1 - rate)`.

    Drawn from the stream `rng_collection`, or from the key `rng` of the call.  Along
    `broadcast_dims` one draw serves all elements.  `deterministic` (of the layer or of the call,
    exactly one of them) turns it off.  A rate outside [0, 1] is a `DropoutRateError`, dims that the
    input does not have are an `AxesError`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer = nn.Dropout(rate=0.5, deterministic=False)
    >>> y = layer.apply({}, jnp.ones(100), rngs={"dropout": jax.random.key(0)})
    >>> sorted(set(y.tolist()))
    [0.0, 2.0]
    """

    rate: float
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    @compact
    def __call__(
        self, inputs: Array, deterministic: bool | None = None, rng: Array | None = None
    ) -> Array:
        deterministic = merge_param("deterministic", self.deterministic, deterministic)
        if not 0.0 <= self.rate <= 1.0:
            raise DropoutRateError(where(self), self.rate)
        if self.rate == 0.0 or deterministic:
            return inputs
        if self.rate == 1.0:
            # Not left to the division below, whose gradient would be NaN.
            return jnp.zeros_like(inputs)
        keep = 1.0 - self.rate
        key = self.make_rng(self.rng_collection) if rng is None else rng
        shape = list(inputs.shape)
        for dim in self.broadcast_dims:
            (known,) = canonical_dims(where(self), "broadcast_dims", dim, inputs.shape)
            shape[known] = 1
        if self.broadcast_dims:
            kept = jax.random.bernoulli(key, keep, shape)
        else:
            kept = laid_out_like(inputs, jax.random.bernoulli, key, keep, tuple(shape))
        return jnp.where(kept, inputs / keep, jnp.zeros_like(inputs))
