"""Streams: where the random numbers of a module come from.

Each stream is one key and a suffix that is not folded in yet.  A draw folds in the path of the
module and how many keys this scope drew from the stream before it, so a key depends only on
*where* and *how often* it is drawn, never on what other modules do.  The folding is that of Linen,
so that initial values agree bit for bit.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from shardflax.core.errors import InvalidRngError
from shardflax.core.staging import fold_in, jx

__all__ = ["Stream", "fold", "is_key", "is_keyless", "open_streams"]

Part = str | int


class Stream(NamedTuple):
    """A key of one stream and the suffix, outside of this run, still to be folded into it.

    >>> key = jax.random.key(0)
    >>> bool(Stream(key, ("a",)).draw(("b", 1)) == fold(key, ("a", "b", 1)))
    True
    """

    key: jax.Array
    suffix: tuple[Part, ...] = ()

    def draw(self, path: tuple[Part, ...]) -> jax.Array:
        """The key at `path`: a module path followed by a count."""
        return fold(self.key, self.suffix + path)

    def as_jax_rng(self) -> jax.Array:
        """The key itself, of which those drawn are descendants."""
        return self.draw(())


def fold(key: jax.Array, path: tuple[Part, ...]) -> jax.Array:
    """Folds a path of names and counts into a key.

    The data folded in are the first four bytes of the SHA-1 of the concatenated parts, names as
    UTF-8 and counts as big-endian bytes.

    >>> bool(fold(jax.random.key(0), ()) == jax.random.key(0))
    True
    """
    return fold_in(key, _digest(path)) if path else key


@functools.lru_cache(maxsize=4096)
def _digest(path: tuple[Part, ...]) -> Any:
    """The number to fold in: numpy's, because making one of JAX's takes longer than folding."""
    sha = hashlib.sha1(usedforsecurity=False)
    for part in path:
        sha.update(part.encode() if isinstance(part, str) else _big_endian(part))
    return np.uint32(int.from_bytes(sha.digest()[:4], "big"))


def _big_endian(count: int) -> bytes:
    return count.to_bytes((count.bit_length() + 7) // 8, "big")


def is_keyless(init_fn: Any) -> bool:
    """True for an initializer that is known to ignore its key.

    These are JAX's `zeros` and `ones`, and what says so by an attribute `keyless`.  The count of
    keys goes on for them too, but to fold one would take longer than to make their values.

    >>> is_keyless(jax.nn.initializers.zeros), is_keyless(jax.nn.initializers.normal())
    (True, False)
    """
    return init_fn is _ZEROS or init_fn is _ONES or bool(getattr(init_fn, "keyless", False))


_ZEROS, _ONES = jax.nn.initializers.zeros, jax.nn.initializers.ones


def is_key(x: Any) -> bool:
    """True for one typed PRNG key or one raw `uint32` key.

    >>> is_key(jax.random.key(0)), is_key(jax.random.PRNGKey(0)), is_key(3)
    (True, True, False)
    """
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        return False
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return x.shape == ()
    return dtype == jnp.uint32 and (x.shape == (2,) or x.shape == _raw_shape())


def _raw_shape() -> tuple[int, ...]:
    """The shape of raw keys of the default implementation: (2,), if JAX is not told otherwise."""
    return jx.eval_shape(jax.random.PRNGKey, 0).shape


def open_streams(rngs: Any) -> dict[str, Stream]:
    """Streams from what users pass as `rngs`: `None`, one key (the stream `params`), or a dict.

    Raises `InvalidRngError` for anything else.

    >>> sorted(open_streams({"params": jax.random.key(0), "dropout": jax.random.key(1)}))
    ['dropout', 'params']
    """
    if rngs is None:
        return {}
    if not isinstance(rngs, Mapping):
        rngs = {"params": rngs}
    keys = cast("Mapping[str, Any]", rngs)
    for name, key in keys.items():
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRngError(f"a stream is named {name!r}; expected a text such as 'dropout'.")
        if not is_key(key):
            raise InvalidRngError(
                f"the stream {name!r} is seeded with {key!r}; expected a key: "
                f"jax.random.key(seed), or a dict of streams to keys."
            )
    return {name: Stream(key) for name, key in keys.items()}
