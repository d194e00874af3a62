"""Rotary position embedding (RoFormer, arXiv:2104.09864)."""

from __future__ import annotations

import jax.numpy as jnp

from shardflax.nn.errors import RotaryError
from shardflax.nn.types import Array

__all__ = ["apply_rotary", "rotary_angles"]


def rotary_angles(positions: Array, head_dim: int, theta: float = 10_000.0) -> Array:
    """The angle of each pair of features at each position, in radians, float32.

    Positions `(...)` give `(..., head_dim / 2)`: `position * theta ** (-2 i / head_dim)` for pair
    `i` (section 3.2.2 of the paper).  An odd `head_dim` is a `RotaryError`.

    >>> import jax.numpy as jnp
    >>> angles = rotary_angles(jnp.array([0, 3]), head_dim=4, theta=100.0)
    >>> [[round(v, 2) for v in row] for row in angles.tolist()]
    [[0.0, 0.0], [3.0, 0.3]]
    """
    if head_dim % 2:
        raise RotaryError("rotary_angles", f"head_dim={head_dim} is odd; features turn in pairs.")
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = jnp.float32(theta) ** -exponents
    turns = jnp.expand_dims(positions, -1).astype(jnp.float32)
    return turns * jnp.reshape(frequencies, (1,) * (turns.ndim - 1) + (-1,))


def apply_rotary(x: Array, positions: Array, theta: float = 10_000.0) -> Array:
    """Turns the features of every head by angles that grow with the position.

    `x` is `(*batch, length, heads, head_dim)`, `positions` `(*batch, length)` or anything that
    broadcasts to it.  Feature `i` pairs with feature `i + head_dim / 2` (Llama's convention; the
    paper pairs neighbours, which is the same up to a permutation of the features).  Computed in
    float32, returned in the dtype of `x`.  An odd `head_dim`, or positions that do not broadcast,
    are a `RotaryError`.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((1, 2, 1, 4))
    >>> y = jax.jit(apply_rotary)(x, jnp.arange(2)[None])
    >>> bool((y[:, 0] == x[:, 0]).all()), bool((y[:, 1] == x[:, 1]).any())
    (True, False)
    """
    target, found = x.shape[:-2], jnp.shape(positions)
    pairs = zip(reversed(found), reversed(target), strict=False)
    if len(found) > len(target) or any(a not in (1, b) for a, b in pairs):
        raise RotaryError(
            "apply_rotary",
            f"positions of shape {found} do not broadcast to {target}, the batch and length dims "
            f"of an input of shape {x.shape}.",
        )
    positions = jnp.expand_dims(positions, tuple(range(len(target) - len(found))))
    angles = jnp.expand_dims(rotary_angles(positions, x.shape[-1], theta), -2)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
