"""Dot-product attention as functions of query, key and value (arXiv:1706.03762)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shardflax.nn.dtypes import promote_dtype
from shardflax.nn.errors import (
    AttentionOptionsError,
    AttentionShapeError,
    InputRankError,
    MaskShapeError,
    where,
)
from shardflax.nn.types import Array, Dtype, Precision

__all__ = ["check_operands", "dot_product_attention", "dot_product_attention_weights"]


def dot_product_attention_weights(
    query: Array,
    key: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype | None = None,
    precision: Precision = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    einsum: Callable[..., Array] | None = None,
) -> Array:
    """How much each query attends to each key: `softmax(query @ key / sqrt(depth))`.

    `query` `(*batch, queries, heads, depth)` and `key` `(*batch, keys, heads, depth)` give
    `(*batch, heads, queries, keys)` in `dtype`, by default what the two promote to (in float32
    with `force_fp32_for_softmax`).  `bias` is
    added and `mask` (true: sees) applied before the softmax; both broadcast to the weights.
    Dropout draws from `dropout_rng`, one draw for all batch and head dims with
    `broadcast_dropout`.  `module` sows the weights as `attention_weights` in `intermediates`.

    Raises an `AttentionShapeError` or `MaskShapeError` for shapes that do not fit, an
    `AttentionOptionsError` for `einsum` together with `einsum_dot_general` or `precision`.

    >>> import jax.numpy as jnp
    >>> q = jnp.ones((2, 5, 4, 8))
    >>> dot_product_attention_weights(q, q).shape
    (2, 4, 5, 5)
    """
    place = "attention" if module is None else where(module)
    query, key = promote_dtype(query, key, dtype=dtype)
    _check_query_key(place, query, key)
    product = _einsum(place, einsum, einsum_dot_general, precision)
    query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    weights = product("...qhd,...khd->...hqk", query, key)
    for what, extra in (("bias", bias), ("mask", mask)):
        _check_broadcasts(place, what, extra, weights.shape)
    if bias is not None:
        weights = weights + bias
    if mask is not None:
        weights = jnp.where(mask, weights, jnp.finfo(query.dtype).min)
    if force_fp32_for_softmax:
        weights = weights.astype(jnp.float32)
    weights = jax.nn.softmax(weights)
    if module is not None:
        module.sow("intermediates", "attention_weights", weights)
    if deterministic or dropout_rate == 0.0:
        return weights
    keep = _dropout(place, weights, dropout_rate, dropout_rng, broadcast_dropout, query.dtype)
    return weights * keep


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype | None = None,
    precision: Precision = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
) -> Array:
    """Means of `value`, weighted by how much each query attends to each key.

    As `dot_product_attention_weights`, with `value` `(*batch, keys, heads, depth)`; the output is
    `(*batch, queries, heads, depth)`.  The two einsums are given together or not at all
    (`AttentionOptionsError`).

    >>> import jax.numpy as jnp
    >>> q, v = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 4, 3))
    >>> dot_product_attention(q, q, v).shape
    (2, 5, 4, 3)
    """
    place = "attention" if module is None else where(module)
    if (qk_attn_weights_einsum is None) != (attn_weights_value_einsum is None):
        raise AttentionOptionsError(
            place, "give `qk_attn_weights_einsum` and `attn_weights_value_einsum` together."
        )
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    _check_key_value(place, key, value)
    weights = dot_product_attention_weights(
        query,
        key,
        bias,
        mask,
        broadcast_dropout,
        dropout_rng,
        dropout_rate,
        deterministic,
        query.dtype,
        precision,
        module,
        force_fp32_for_softmax,
        einsum_dot_general,
        qk_attn_weights_einsum,
    )
    product = _einsum(place, attn_weights_value_einsum, einsum_dot_general, precision)
    return product("...hqk,...khd->...qhd", weights, value)


def check_operands(place: Any, query: Array, key: Array, value: Array, mask: Any) -> None:
    """Raises what `dot_product_attention` would raise, in the name of the layer that calls it.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> check_operands("here", x, x, x, jnp.ones((1, 2, 3, 5)))
    Traceback (most recent call last):
    shardflax.nn.errors.MaskShapeError: here: mask of shape (1, 2, 3, 5) does not broadcast to ...
    """
    _check_query_key(place, query, key)
    _check_key_value(place, key, value)
    if mask is not None:
        (*batch, length, heads, _), (*_, keys, _, _) = query.shape, key.shape
        _check_broadcasts(place, "mask", mask, (*batch, heads, length, keys))


def _einsum(place: str, einsum: Any, dot_general: Any, precision: Precision) -> Any:
    """What multiplies: `einsum` if given, else JAX's with `dot_general` and `precision`."""
    if einsum is not None:
        if dot_general is not None or precision is not None:
            raise AttentionOptionsError(
                place, "give `einsum`, or `einsum_dot_general` and `precision`, not both."
            )
        return einsum
    options = {} if dot_general is None else {"_dot_general": dot_general}
    return functools.partial(jnp.einsum, precision=precision, **options)


def _check_query_key(place: str, query: Array, key: Array) -> None:
    q, k = query.shape, key.shape
    for what, shape in (("query", q), ("key", k)):
        if len(shape) < 3:
            raise InputRankError(place, what, "(*batch, length, heads, depth)", shape)
    if len(q) != len(k):
        raise AttentionShapeError(place, "ranks", query=q, key=k)
    if q[:-3] != k[:-3]:
        raise AttentionShapeError(place, "batch dims", query=q, key=k)
    if q[-2] != k[-2]:
        raise AttentionShapeError(place, "heads (dim -2)", query=q, key=k)
    if q[-1] != k[-1]:
        raise AttentionShapeError(place, "depths (dim -1)", query=q, key=k)


def _check_key_value(place: str, key: Array, value: Array) -> None:
    k, v = key.shape, value.shape
    if len(v) != len(k) or len(v) < 3:
        raise AttentionShapeError(place, "ranks", key=k, value=v)
    if k[-3] != v[-3]:
        raise AttentionShapeError(place, "lengths (dim -3)", key=k, value=v)
    if k[:-1] != v[:-1]:
        raise AttentionShapeError(place, "batch dims and heads", key=k, value=v)


def _check_broadcasts(place: str, what: str, x: Any, target: tuple[int, ...]) -> None:
    if x is None:
        return
    shape = jnp.shape(x)
    pairs = zip(reversed(shape), reversed(target), strict=False)
    if len(shape) > len(target) or any(a not in (1, b) for a, b in pairs):
        raise MaskShapeError(place, what, shape, target)


def _dropout(
    place: str, weights: Array, rate: float, rng: Any, broadcast: bool, dtype: Dtype
) -> Array:
    """Factors of the weights: 0 or 1 / (1 - rate), drawn once for all batch dims and heads."""
    if rng is None:
        raise AttentionOptionsError(
            place, f"dropout_rate={rate} draws random numbers: pass `dropout_rng`."
        )
    keep = 1.0 - rate
    shape = weights.shape
    if broadcast:
        shape = (1,) * (weights.ndim - 2) + shape[-2:]
    kept = jax.random.bernoulli(rng, keep, shape)
    return kept.astype(dtype) / jnp.asarray(keep, dtype=dtype)
