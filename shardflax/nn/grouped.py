"""Causal self-attention with grouped key/value heads and rotary positions, as decoders use it."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

import jax.numpy as jnp

from shardflax.core import compact
from shardflax.nn import _names as names
from shardflax.nn import initializers
from shardflax.nn._cache import KVCache, open_cache
from shardflax.nn._grouped import Attention, as_window, both, check_mask, near
from shardflax.nn._sizes import check_sizes
from shardflax.nn.errors import CacheShapeError, HeadsError, InputRankError, where
from shardflax.nn.general import DenseGeneral
from shardflax.nn.normalization import RMSNorm
from shardflax.nn.policy import LayerBase
from shardflax.nn.rotary import apply_rotary
from shardflax.nn.stochastic import merge_param
from shardflax.nn.types import Array, Dtype, Initializer, Names, Precision
from shardflax.partitioning import default_names

__all__ = ["GroupedQueryAttention"]


class GroupedQueryAttention(LayerBase):
    """Self-attention in which groups of query heads share key/value heads (arXiv:2305.13245).

    Inputs `(batch, length, features)` give `(batch, length, out_features)`, by default as wide as
    the input; without the batch dim too.  `num_kv_heads` defaults to `num_heads` (multi-head), 1
    is multi-query; `head_dim` defaults to `features / num_heads`.  Parameters are those of
    the `DenseGeneral` layers `query` `(features, num_heads, head_dim)`, `key` and `value`
    `(features, num_kv_heads, head_dim)` and `out` `(num_heads, head_dim, features)`, and with
    `normalize_qk` of the `RMSNorm`s `query_norm` and `key_norm` over each head.

    Queries and keys are rotated by their `positions` (`(batch, length)`, default 0, 1, ...), with
    base `rope_theta`; `None` for none.  With `causal`, a token sees itself and what comes before;
    `mask`, if given, takes away more (true: seen) and broadcasts to
    `(batch, num_heads, length, keys)`.  Scores and softmax are float32 whatever `dtype` is.

    `window`, one number or one for each side, limits how many tokens before (and after) it a token
    sees besides itself.  `logit_softcap` bounds the scores: `cap * tanh(scores / cap)`
    (arXiv:2408.00118).

    `implementation` says what computes it: `"xla"` and `"cudnn"` are those of
    `jax.nn.dot_product_attention`, `"flash"` is the splash attention kernel on TPU, and
    `"reference"` the formula, spelled out.  By default it is a kernel where the devices (of the
    mesh in scope) have one that knows these shapes and options: without mask, cache, dropout and
    `precision`; on TPU lengths of a multiple of 128 and depths of 64, spread over batch and heads
    alone, on GPU half precision without `logit_softcap`.

    With `decode`, keys and values are kept in the collection `cache`.  It is `cache_length` long,
    or else as long as the input of `init`; each `apply` with `mutable=["cache"]` appends
    any number of tokens (the whole prompt at once, then one at a time), at the positions after
    those that are there.  Masks then have `keys = cache_length`.  Beyond its length the output is
    NaN.

    Raises `HeadsError` where `num_heads` is not a multiple of `num_kv_heads`, or the features not
    of `num_heads`; `InputRankError`, `MaskShapeError`, `CacheShapeError`, `RotaryError` for shapes
    that do not fit; `AttentionOptionsError` for an `implementation` that does not know what else is
    asked for.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer, x = nn.GroupedQueryAttention(num_heads=4, num_kv_heads=2), jnp.ones((1, 5, 8))
    >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
    >>> y.shape, variables["params"]["key"]["kernel"].shape
    ((1, 5, 8), (8, 2, 2))
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    rope_theta: float | None = 10_000.0
    causal: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: Precision = None
    kernel_init: Initializer = initializers.lecun_normal()
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = initializers.zeros
    use_bias: bool = False
    normalize_qk: bool = False
    norm_epsilon: float = 1e-6
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    decode: bool = False
    cache_length: int | None = None
    implementation: Literal["xla", "cudnn", "flash", "reference"] | None = None
    window: int | tuple[int, int] | None = field(default=None, kw_only=True)
    logit_softcap: float | None = field(default=None, kw_only=True)
    query_axes: Names = field(default=default_names("embed", "heads", "head_dim"), kw_only=True)
    kv_axes: Names = field(default=default_names("embed", "kv_heads", "head_dim"), kw_only=True)
    out_kernel_axes: Names = field(
        default=default_names("heads", "head_dim", "embed"), kw_only=True
    )
    qk_norm_axes: Names = field(default=default_names("norm"), kw_only=True)
    act_query_axes: Names | None = field(
        default=default_names("batch", "length", "act_heads", "act_head_dim"), kw_only=True
    )
    act_kv_axes: Names | None = field(
        default=default_names("batch", "kv_length", "act_kv_heads", "act_head_dim"), kw_only=True
    )
    cache_axes: Names = field(
        default=default_names("cache_batch", "cache_length", "cache_kv_heads", "head_dim"),
        kw_only=True,
    )
    out_axes: Names | None = field(default=names.RESIDUAL, kw_only=True)

    @compact
    def __call__(
        self,
        x: Array,
        *,
        positions: Array | None = None,
        mask: Array | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        kv_heads, depth = self._sizes(x)
        query = self._project("query", x, self.num_heads, depth)
        key = self._project("key", x, kv_heads, depth)
        value = self._project("value", x, kv_heads, depth)
        if self.normalize_qk:
            query, key = self._normalize("query_norm", query), self._normalize("key_norm", key)
        cache = self._cache(key, value) if self.decode else None
        slots = jnp.arange(x.shape[-2], dtype=jnp.int32)
        if cache is not None:
            slots = cache.positions(x.shape[-2])
        positions = slots if positions is None else positions
        if self.rope_theta is not None:
            query = apply_rotary(query, positions, self.rope_theta)
            key = apply_rotary(key, positions, self.rope_theta)
        attention = self._attention()
        if cache is not None and not self.is_initializing():
            seen = cache.visible(slots if self.causal else jnp.full_like(slots, slots[-1]))
            places = jnp.arange(cache.length, dtype=jnp.int32)
            seen = jnp.logical_and(seen, near(attention.window, slots, places))
            attention = attention.of_slots()
            key, value = (kv.astype(query.dtype) for kv in cache.append(key, value))
            check_mask(where(self), mask, query, key)
            mask = both(mask, seen, query.ndim)
        y = attention(query, key, value, mask, self._dropout_key(deterministic))
        if cache is not None:
            y = cache.poison(y)
        y = names.output(y, self.act_query_axes)
        return self._project_out(y, x.shape[-1])

    def _sizes(self, x: Array) -> tuple[int, int]:
        """The numbers of key/value heads and of features of a head."""
        place = where(self)
        if jnp.ndim(x) not in (2, 3):
            raise InputRankError(place, "inputs", "(batch, length, features)", jnp.shape(x))
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        check_sizes(self, num_heads=self.num_heads, num_kv_heads=kv_heads)
        if kv_heads < 1 or self.num_heads < 1 or self.num_heads % kv_heads:
            raise HeadsError(place, num_heads=self.num_heads, num_kv_heads=kv_heads)
        if self.head_dim is not None:
            check_sizes(self, head_dim=self.head_dim)
            return kv_heads, self.head_dim
        if x.shape[-1] % self.num_heads:
            raise HeadsError(place, features=x.shape[-1], num_heads=self.num_heads)
        return kv_heads, x.shape[-1] // self.num_heads

    def _project(self, name: str, x: Array, heads: int, depth: int) -> Array:
        is_query = name == "query"
        return DenseGeneral(
            features=(heads, depth),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            use_bias=self.use_bias,
            kernel_axes=self.query_axes if is_query else self.kv_axes,
            out_axes=self.act_query_axes if is_query else self.act_kv_axes,
            name=name,
        )(x)

    def _normalize(self, name: str, x: Array) -> Array:
        return RMSNorm(
            epsilon=self.norm_epsilon,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            scale_axes=self.qk_norm_axes,
            out_axes=None,
            name=name,
        )(x)

    def _cache(self, key: Array, value: Array) -> KVCache:
        """The cache, which `init` makes, or the first call if `cache_length` says how long."""
        there = self.is_initializing() or self.has_variable("cache", "cached_key")
        if not there and self.cache_length is None:
            raise CacheShapeError(
                where(self),
                "there is no cache, and nothing says how long to make one. Pass the cache that "
                "`init` made, or set `cache_length`.",
            )
        return open_cache(self, key, value, self.cache_axes, self.cache_length)[0]

    def _attention(self) -> Attention:
        return Attention(
            where(self),
            causal=self.causal,
            window=as_window(where(self), self.window),
            softcap=self.logit_softcap,
            implementation=self.implementation,
            precision=self.precision,
            dropout_rate=self.dropout_rate,
            query_axes=self.act_query_axes,
        )

    def _dropout_key(self, deterministic: bool | None) -> Array | None:
        if self.dropout_rate == 0.0:
            return None
        if merge_param("deterministic", self.deterministic, deterministic):
            return None
        return self.make_rng("dropout")

    def _project_out(self, y: Array, width: int) -> Array:
        return DenseGeneral(
            features=width if self.out_features is None else self.out_features,
            axis=(-2, -1),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.bias_init,
            use_bias=self.use_bias,
            kernel_axes=self.out_kernel_axes,
            out_axes=self.out_axes,
            name="out",
        )(y)
