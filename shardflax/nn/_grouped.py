"""The computation of grouped-query attention: JAX's where it fits, and the formula itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from shardflax.nn.errors import MaskShapeError
from shardflax.nn.types import Array, Precision


def check_mask(place: str, mask: Any, query: Array, key: Array) -> None:
    """Raises unless `mask` is None or broadcasts to `(batch, heads, queries, keys)`."""
    if mask is None:
        return
    target = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    shape = jnp.shape(mask)
    pairs = zip(reversed(shape), reversed(target), strict=False)
    if len(shape) > len(target) or any(a not in (1, b) for a, b in pairs):
        raise MaskShapeError(place, "mask", shape, target)


def both(mask: Any, seen: Array, ndim: int) -> Array:
    """What `mask` (or None) and `seen` `(queries, keys)` both let be seen, with `ndim` dims."""
    seen = _lift(seen, ndim)
    return seen if mask is None else jnp.logical_and(_lift(mask, ndim), seen)


def _lift(mask: Any, ndim: int) -> Array:
    """`mask` with dims of size 1 in front, up to `ndim`."""
    mask = jnp.asarray(mask, bool)
    return jnp.reshape(mask, (1,) * (ndim - mask.ndim) + mask.shape)


def grouped_attention(
    place: str,
    query: Array,
    key: Array,
    value: Array,
    mask: Any,
    *,
    causal: bool,
    implementation: str | None,
    precision: Precision,
    dropout_rate: float,
    dropout_rng: Any,
) -> Array:
    """Attention of `query` `(..., queries, heads, depth)` to `(..., keys, kv_heads, depth)`.

    Scores and softmax in float32, the output in the dtype of `query`.
    """
    check_mask(place, mask, query, key)
    if mask is not None:
        mask = _lift(mask, query.ndim)
    plain = dropout_rng is None and precision is None and implementation != "reference"
    if plain:
        implemented: Any = implementation
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=causal, implementation=implemented
        )
    return reference(query, key, value, mask, causal, precision, dropout_rate, dropout_rng)


def reference(
    query: Array,
    key: Array,
    value: Array,
    mask: Any = None,
    causal: bool = True,
    precision: Precision = None,
    dropout_rate: float = 0.0,
    dropout_rng: Any = None,
) -> Array:
    """The formula: softmax(query @ key / sqrt(depth)) @ value, for each group of heads."""
    heads, kv_heads = query.shape[-2], key.shape[-2]
    groups = jnp.reshape(query, (*query.shape[:-2], kv_heads, heads // kv_heads, query.shape[-1]))
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum(
        "...qkgd,...skd->...kgqs", groups, key, precision=precision, preferred_element_type=wide
    )
    scores = scores * jnp.asarray(query.shape[-1] ** -0.5, wide)
    seen = _visible(scores, mask, causal, heads)
    if seen is not None:
        scores = jnp.where(seen, scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if dropout_rng is not None:
        keep = 1.0 - dropout_rate
        kept = jax.random.bernoulli(dropout_rng, keep, weights.shape)
        weights = jnp.where(kept, weights / keep, 0.0)
    weights = weights.astype(value.dtype)
    y = jnp.einsum("...kgqs,...skd->...qkgd", weights, value, precision=precision)
    return jnp.reshape(y, (*query.shape[:-1], value.shape[-1])).astype(query.dtype)


def _visible(scores: Array, mask: Any, causal: bool, heads: int) -> Any:
    """What is seen, shaped to broadcast to `(..., kv_heads, group, queries, keys)`."""
    seen = None
    if mask is not None:
        # (..., heads or 1, queries, keys): the heads split as those of the scores do.
        split = scores.shape[-4:-2] if mask.shape[-3] == heads else (1, 1)
        seen = jnp.reshape(mask, (*mask.shape[:-3], *split, *mask.shape[-2:]))
    if causal:
        before = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        before = _lift(before, scores.ndim)
        seen = before if seen is None else jnp.logical_and(seen, before)
    return seen
