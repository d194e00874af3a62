"""Dot-product attention as functions of query, key and value (arXiv:1706.03762)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shardflax.nn.dtypes import promote_dtype
from shardflax.nn.errors import (
    AttentionOptionsError,
    AttentionShapeError,
    DropoutRateError,
    InputRankError,
    MaskShapeError,
)
from shardflax.nn.types import Array, Dtype, Precision

__all__ = ["DotProduct", "dot_product_attention", "dot_product_attention_weights"]


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
    `AttentionOptionsError` for `einsum` together with `einsum_dot_general` or `precision`, a
    `DropoutRateError` for a rate outside [0, 1].

    >>> import jax, jax.numpy as jnp
    >>> q = jnp.ones((2, 5, 4, 8))
    >>> jax.eval_shape(dot_product_attention_weights, q, q).shape
    (2, 4, 5, 5)
    """
    options = broadcast_dropout, dropout_rng, dropout_rate, deterministic, dtype, precision
    how = DotProduct(
        _place(module), *options, module, force_fp32_for_softmax, einsum_dot_general, einsum
    )
    return how.weights(query, key, bias, mask)


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

    >>> import jax, jax.numpy as jnp
    >>> q, v = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 4, 3))
    >>> jax.eval_shape(dot_product_attention, q, q, v).shape
    (2, 5, 4, 3)
    """
    options = broadcast_dropout, dropout_rng, dropout_rate, deterministic, dtype, precision
    how = DotProduct(
        _place(module),
        *options,
        module,
        force_fp32_for_softmax,
        einsum_dot_general,
        qk_attn_weights_einsum,
        attn_weights_value_einsum,
    )
    return how(query, key, value, bias, mask)


def _place(module: Any) -> Any:
    return "attention" if module is None else module


class DotProduct(NamedTuple):
    """How attention is computed: the arguments of `dot_product_attention` that are no operands.

    `place` is what errors name: a layer, or a text.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> DotProduct("here")(x, x, x, mask=jnp.ones((1, 2, 3, 5)))
    Traceback (most recent call last):
    shardflax.nn.errors.MaskShapeError: here: mask of shape (1, 2, 3, 5) does not broadcast to ...
    """

    place: Any
    broadcast_dropout: bool = True
    dropout_rng: Array | None = None
    dropout_rate: float = 0.0
    deterministic: bool = False
    dtype: Dtype | None = None
    precision: Precision = None
    module: Any = None
    force_fp32_for_softmax: bool = False
    einsum_dot_general: Callable[..., Array] | None = None
    qk_attn_weights_einsum: Callable[..., Array] | None = None
    attn_weights_value_einsum: Callable[..., Array] | None = None

    def __call__(
        self, query: Array, key: Array, value: Array, bias: Any = None, mask: Any = None
    ) -> Array:
        """Means of `value`, weighted: see `dot_product_attention`."""
        if (self.qk_attn_weights_einsum is None) != (self.attn_weights_value_einsum is None):
            raise AttentionOptionsError(
                self.place,
                "give `qk_attn_weights_einsum` and `attn_weights_value_einsum` together.",
            )
        query, key, value = promote_dtype(query, key, value, dtype=self.dtype)
        _check_key_value(self.place, key, value)
        weights = self._weights(query, key, bias, mask)
        product = self._product(self.attn_weights_value_einsum)
        return product("...hqk,...khd->...qhd", weights, value)

    def weights(self, query: Array, key: Array, bias: Any = None, mask: Any = None) -> Array:
        """How much each query attends to each key: see `dot_product_attention_weights`."""
        query, key = promote_dtype(query, key, dtype=self.dtype)
        return self._weights(query, key, bias, mask)

    def _weights(self, query: Array, key: Array, bias: Any, mask: Any) -> Array:
        _check_query_key(self.place, query, key)
        product = self._product(self.qk_attn_weights_einsum)
        query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
        weights = product("...qhd,...khd->...hqk", query, key)
        for what, extra in (("bias", bias), ("mask", mask)):
            _check_broadcasts(self.place, what, extra, weights.shape)
        if bias is not None:
            weights = weights + bias
        if mask is not None:
            weights = jnp.where(mask, weights, jnp.finfo(query.dtype).min)
        if self.force_fp32_for_softmax:
            weights = weights.astype(jnp.float32)
        weights = jax.nn.softmax(weights)
        if self.module is not None:
            self.module.sow("intermediates", "attention_weights", weights)
        if self.deterministic or self.dropout_rate == 0.0:
            return weights
        return weights * self._kept(weights.shape, query.dtype)

    def _product(self, einsum: Any) -> Any:
        """What multiplies: `einsum` if given, else JAX's with `dot_general` and `precision`."""
        if einsum is not None:
            if self.einsum_dot_general is not None or self.precision is not None:
                raise AttentionOptionsError(
                    self.place, "give `einsum`, or `einsum_dot_general` and `precision`, not both."
                )
            return einsum
        dot = self.einsum_dot_general
        options = {} if dot is None else {"_dot_general": dot}
        return functools.partial(jnp.einsum, precision=self.precision, **options)

    def _kept(self, shape: tuple[int, ...], dtype: Dtype) -> Array:
        """Factors of the weights: 0 or 1 / (1 - rate), drawn once for all batch dims and heads."""
        if self.dropout_rng is None:
            raise AttentionOptionsError(
                self.place,
                f"dropout_rate={self.dropout_rate} draws random numbers: pass `dropout_rng`.",
            )
        if not 0.0 <= self.dropout_rate <= 1.0:
            raise DropoutRateError(self.place, self.dropout_rate)
        keep = 1.0 - self.dropout_rate
        if self.broadcast_dropout:
            shape = (1,) * (len(shape) - 2) + shape[-2:]
        if keep == 0.0:
            return jnp.zeros(shape, dtype)
        kept = jax.random.bernoulli(self.dropout_rng, keep, shape)
        return kept.astype(dtype) / jnp.asarray(keep, dtype=dtype)


def _check_query_key(place: Any, query: Array, key: Array) -> None:
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


def _check_key_value(place: Any, key: Array, value: Array) -> None:
    k, v = key.shape, value.shape
    if len(v) != len(k) or len(v) < 3:
        raise AttentionShapeError(place, "ranks", key=k, value=v)
    if k[-3] != v[-3]:
        raise AttentionShapeError(place, "lengths (dim -3)", key=k, value=v)
    if k[:-1] != v[:-1]:
        raise AttentionShapeError(place, "batch dims and heads", key=k, value=v)


def _check_broadcasts(place: Any, what: str, x: Any, target: tuple[int, ...]) -> None:
    if x is None:
        return
    shape = jnp.shape(x)
    pairs = zip(reversed(shape), reversed(target), strict=False)
    if len(shape) > len(target) or any(a not in (1, b) for a, b in pairs):
        raise MaskShapeError(place, what, shape, target)
