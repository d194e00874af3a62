"""The key/value cache of autoregressive decoding, as variables of the collection `cache`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from shardflax import partitioning
from shardflax.nn import _names, initializers
from shardflax.nn.errors import CacheShapeError, where
from shardflax.nn.types import Array, Names
from shardflax.partitioning import default_names
from shardflax.partitioning.explicit_out import explicit_axes, laid_out_like, operand


class KVCache(NamedTuple):
    """`cached_key` and `cached_value` `(*batch, length, heads, depth)`, and how much is filled."""

    place: str
    key: Any
    value: Any
    index: Any
    axes: Names

    @property
    def length(self) -> int:
        return self.key.value.shape[-3]

    def append(self, key: Array, value: Array) -> tuple[Array, Array]:
        """Writes the keys and values of new tokens behind the old ones; returns the whole cache."""
        self._check(key, value)
        zero = jnp.zeros_like(self.index.value)  # of its dtype: with 64 bits a plain 0 is int64
        start = (*[zero] * (key.ndim - 3), self.index.value, zero, zero)
        for variable, new in ((self.key, key), (self.value, value)):
            old = variable.value
            # A length over an explicit axis has no type that one new token could have, too.
            new = new.astype(old.dtype)
            whole = laid_out_like(old, lax.dynamic_update_slice, old, new, start)
            variable.value = _names.output(whole, self.axes)
        self.index.value = self.index.value + key.shape[-3]
        return self.key.value, self.value.value

    def positions(self, tokens: int) -> Array:
        """The positions of the next `tokens` tokens, `(tokens,)`: ask before `append`."""
        return self.index.value + jnp.arange(tokens, dtype=jnp.int32)

    def visible(self, positions: Array) -> Array:
        """Which slots tokens at `positions` see: their own and those before, `(tokens, length)`."""
        return jnp.arange(self.length, dtype=jnp.int32)[None, :] <= positions[:, None]

    def poison(self, y: Array) -> Array:
        """NaN instead of silent nonsense, once more was written than the cache has room for."""
        fits = self.index.value <= self.length
        return jnp.where(fits, y, jnp.asarray(jnp.nan, y.dtype))

    def _check(self, key: Array, value: Array) -> None:
        tokens, room = key.shape[-3], self.length
        if tokens > room:
            raise CacheShapeError(
                self.place,
                f"{tokens} tokens at once into a cache of length {room} (dim -3). Initialise it "
                "with a longer input, or feed fewer tokens.",
            )
        for what, new, old in (("key", key, self.key.value), ("value", value, self.value.value)):
            if new.shape[:-3] != old.shape[:-3] or new.shape[-2:] != old.shape[-2:]:
                raise CacheShapeError(
                    self.place,
                    f"the {what} of this step has shape {new.shape}, the cached one {old.shape}: "
                    "all dims but the length (dim -3) must be equal.",
                )


def over_keys(fn: Callable[..., Array], query: Array, key: Array, *args: Any) -> Array:
    """`fn(query, key, *args)`, shaped and laid out like `query`: what it sees of all keys.

    Where their length lies over an explicit axis, a softmax over it has no type of its own.
    """
    if explicit_axes() and operand(range(key.ndim), key).spec[-3] is not None:
        return laid_out_like(query, fn, query, key, *args)
    return fn(query, key, *args)


def _for_rank(axes: Names, rank: int) -> Names:
    """Default names, made for one batch dim, for none or several."""
    if not _names.is_default(axes) or len(axes) == rank:
        return axes
    batch, rest = axes[:-3], axes[-3:]
    missing = rank - 3 - len(batch)
    return default_names(*batch[: rank - 3], *[None] * max(missing, 0), *rest)


def open_cache(
    module: Any, key: Array, value: Array, axes: Names, length: int | None = None
) -> tuple[KVCache, bool]:
    """The cache of `module`, and whether it was there before: a new one is not to be written to.

    A new cache is shaped like `key` and `value`, with `length` in the place of theirs.
    """
    existed = module.has_variable("cache", "cached_key")
    axes = _for_rank(axes, key.ndim)

    def buffer(name: str, x: Array) -> Any:
        shape = x.shape if length is None else (*x.shape[:-3], length, *x.shape[-2:])
        init = partitioning.named(initializers.zeros, axes)
        return module.variable("cache", name, init, None, shape, x.dtype)

    keys, values = buffer("cached_key", key), buffer("cached_value", value)
    index = module.variable("cache", "cache_index", lambda: jnp.array(0, dtype=jnp.int32))
    return KVCache(where(module), keys, values, index, axes), existed
