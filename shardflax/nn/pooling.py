"""Pooling: reductions over windows of the spatial dims of an input with its features last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax.numpy as jnp
from jax import lax

from shardflax.nn import _windows as windows
from shardflax.nn.types import Array, Padding

__all__ = ["avg_pool", "max_pool", "min_pool", "pool"]


def pool(
    inputs: Array,
    init: Any,
    reduce_fn: Callable[[Any, Any], Any],
    window_shape: int | Sequence[int],
    strides: int | Sequence[int] | None,
    padding: Padding,
) -> Array:
    """Reduces windows of `inputs` `(*batch, *spatial, features)` by `reduce_fn`, from `init`.

    `window_shape` and `strides` (default: 1) have an entry for each spatial dim (an int is a window
    of one dim, or the stride of all).  `padding`, of elements equal to `init`, is `"SAME"`,
    `"SAME_LOWER"`, `"VALID"`, an int, or a pair (low, high) for each spatial dim.  There may be no
    batch dim, or several.  Derivatives are those of XLA's window reduction: they exist for sums,
    maxima and minima.

    Raises `InputRankError` for inputs with too few dims, `WindowError` for entries that do not
    match, `PaddingError` for a padding that is none.

    >>> import jax.numpy as jnp
    >>> from jax import lax
    >>> pool(jnp.arange(4.0)[:, None], 0.0, lax.add, (2,), (2,), "VALID")[:, 0].tolist()
    [1.0, 5.0]
    """
    return _pool("pool", inputs, init, reduce_fn, window_shape, strides, padding)


def _pool(
    place: str,
    inputs: Array,
    init: Any,
    reduce_fn: Callable[[Any, Any], Any],
    window_shape: int | Sequence[int],
    strides: int | Sequence[int] | None,
    padding: Padding,
) -> Array:
    """`pool`, with the name of the function that the user called."""
    window = windows.sizes(place, "window_shape", window_shape)
    ndim = len(window)
    x, batch = windows.fold_batch(place, jnp.asarray(inputs), ndim)
    steps = windows.per_dim(place, "strides", strides, ndim, by="window_shape")
    pads: Any = windows.resolve_padding(place, padding, ndim)
    if not isinstance(pads, str):
        pads = ((0, 0), *pads, (0, 0))
    y = lax.reduce_window(x, init, reduce_fn, (1, *window, 1), (1, *steps, 1), pads)
    return windows.unfold_batch(y, batch)


def max_pool(
    inputs: Array,
    window_shape: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> Array:
    """The maximum of each window; arguments and errors are those of `pool`.

    >>> import jax.numpy as jnp
    >>> max_pool(jnp.arange(4.0)[:, None], (2,))[:, 0].tolist()
    [1.0, 2.0, 3.0]
    """
    least = _limit(inputs, smallest=True)
    return _pool("max_pool", inputs, least, lax.max, window_shape, strides, padding)


def min_pool(
    inputs: Array,
    window_shape: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> Array:
    """The minimum of each window; arguments and errors are those of `pool`.

    >>> import jax.numpy as jnp
    >>> min_pool(jnp.arange(4.0)[:, None], (2,))[:, 0].tolist()
    [0.0, 1.0, 2.0]
    """
    greatest = _limit(inputs, smallest=False)
    return _pool("min_pool", inputs, greatest, lax.min, window_shape, strides, padding)


def avg_pool(
    inputs: Array,
    window_shape: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> Array:
    """The mean of each window; arguments and errors are those of `pool`.

    With `count_include_pad`, the elements of the padding count as zeros; without, they do not.

    >>> import jax.numpy as jnp
    >>> avg_pool(jnp.ones((3, 1)), (2,), padding="SAME")[:, 0].tolist()
    [1.0, 1.0, 0.5]
    >>> avg_pool(jnp.ones((3, 1)), (2,), padding="SAME", count_include_pad=False)[:, 0].tolist()
    [1.0, 1.0, 1.0]
    """
    y = _pool("avg_pool", inputs, 0.0, lax.add, window_shape, strides, padding)
    window = windows.sizes("avg_pool", "window_shape", window_shape)
    if count_include_pad:
        return y / prod(window)
    spatial = jnp.shape(inputs)[-1 - len(window) : -1]
    ones = jnp.ones((*(1,) * (y.ndim - len(spatial) - 1), *spatial, 1))
    counts = _pool("avg_pool", ones, 0.0, lax.add, window_shape, strides, padding)
    if y.dtype.itemsize < 4:
        y = y.astype(jnp.float32)  # as in Linen
    return y / counts.astype(y.dtype)


def _limit(x: Array, smallest: bool) -> Any:
    """What every element of `x` is at least as large (or small) as."""
    dtype = jnp.result_type(x)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return info.min if smallest else info.max
    if dtype == jnp.bool_:
        return not smallest
    return -jnp.inf if smallest else jnp.inf
