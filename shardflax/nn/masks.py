"""Attention masks: who may see whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from shardflax.nn.errors import AttentionShapeError, InputRankError
from shardflax.nn.types import Array, Dtype

__all__ = ["combine_masks", "make_attention_mask", "make_causal_mask"]


def make_attention_mask(
    query_input: Array,
    key_input: Array,
    pairwise_fn: Callable[..., Any] = jnp.multiply,
    extra_batch_dims: int = 0,
    dtype: Dtype = jnp.float32,
) -> Array:
    """`pairwise_fn` of every query with every key, as a mask that broadcasts over heads.

    Inputs `(*batch, queries)` and `(*batch, keys)` give `(*batch, 1, queries, keys)` in `dtype`,
    with `extra_batch_dims` dims of size 1 in front.  Inputs without dims are an `InputRankError`,
    batch dims that do not broadcast an `AttentionShapeError`.

    >>> import jax.numpy as jnp
    >>> tokens = jnp.array([[5, 7, 0]])
    >>> make_attention_mask(tokens > 0, tokens > 0)[0, 0].astype(int).tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    """
    queries, keys = jnp.shape(query_input), jnp.shape(key_input)
    for what, shape in (("query_input", queries), ("key_input", keys)):
        if not shape:
            raise InputRankError("make_attention_mask", what, "(*batch, length)", shape)
    sizes = zip(reversed(queries[:-1]), reversed(keys[:-1]), strict=False)
    if any(1 not in (q, k) and q != k for q, k in sizes):
        shapes = {"query_input": queries, "key_input": keys}
        raise AttentionShapeError("make_attention_mask", "batch dims", **shapes)
    pairs = pairwise_fn(jnp.expand_dims(query_input, -1), jnp.expand_dims(key_input, -2))
    mask = jnp.expand_dims(pairs, -3)
    return jnp.expand_dims(mask, tuple(range(extra_batch_dims))).astype(dtype)


def make_causal_mask(x: Array, extra_batch_dims: int = 0, dtype: Dtype = jnp.float32) -> Array:
    """A mask in which each position sees itself and what is before it.

    `x` `(*batch, length)` counts by its shape alone; the mask is `(*batch, 1, length, length)`.

    >>> import jax.numpy as jnp
    >>> make_causal_mask(jnp.ones((1, 3)))[0, 0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    if not jnp.ndim(x):
        raise InputRankError("make_causal_mask", "x", "(*batch, length)", ())
    positions = jnp.broadcast_to(jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape)
    return make_attention_mask(
        positions, positions, jnp.greater_equal, extra_batch_dims=extra_batch_dims, dtype=dtype
    )


def combine_masks(*masks: Array | None, dtype: Dtype = jnp.float32) -> Array | None:
    """The logical and of all `masks` that are not `None`, in `dtype`; `None` if all are.

    Masks of different ranks are an `AttentionShapeError`.

    >>> import jax.numpy as jnp
    >>> combine_masks(jnp.array([1, 1, 0]), None, jnp.array([0, 1, 1])).tolist()
    [0.0, 1.0, 0.0]
    """
    given = [m for m in masks if m is not None]
    if not given:
        return None
    if len({m.ndim for m in given}) > 1:
        shapes = {f"mask {i}": m.shape for i, m in enumerate(given)}
        raise AttentionShapeError("combine_masks", "ranks", **shapes)
    mask, *others = given
    for other in others:
        mask = jnp.logical_and(mask, other)
    return mask.astype(dtype)
