"""Linen's attention layers: `MultiHeadDotProductAttention` and its two other names."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import field
from typing import Any

import jax.numpy as jnp

from shardflax.core import compact, nowrap
from shardflax.nn import _names as names
from shardflax.nn import initializers
from shardflax.nn._cache import KVCache, open_cache, over_keys
from shardflax.nn._sizes import check_sizes
from shardflax.nn.dot_product import (
    DotProduct,
    dot_product_attention,
    dot_product_attention_weights,
)
from shardflax.nn.errors import (
    AttentionOptionsError,
    DropoutRateError,
    HeadsError,
    InputRankError,
    where,
)
from shardflax.nn.general import DenseGeneral
from shardflax.nn.masks import combine_masks, make_attention_mask, make_causal_mask
from shardflax.nn.normalization import LayerNorm
from shardflax.nn.policy import LayerBase
from shardflax.nn.stochastic import merge_param
from shardflax.nn.types import Array, DotGeneral, Dtype, Initializer, Names, Precision
from shardflax.partitioning import default_names

__all__ = [
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "SelfAttention",
    "combine_masks",
    "dot_product_attention",
    "dot_product_attention_weights",
    "make_attention_mask",
    "make_causal_mask",
]


class MultiHeadDotProductAttention(LayerBase):
    """Multi-head dot-product attention (arXiv:1706.03762).

    Queries come from `inputs_q` `(*batch, queries, features)`, keys from `inputs_k` (default: the
    queries' input), values from `inputs_v` (default: the keys'), both `(*batch, keys, features)`;
    the output is `(*batch, queries, out_features)`.  `mask` broadcasts to
    `(*batch, heads, queries, keys)`; true means seen.  Parameters are those of the `DenseGeneral`
    layers `query`, `key`, `value` `(features, heads, depth)` and `out` `(heads, depth, features)`,
    and with `normalize_qk` of the `LayerNorm`s `query_ln` and `key_ln`.

    With `decode`, keys and values are kept in the collection `cache`, which `init` makes as long
    as its input; each `apply` with `mutable=["cache"]` appends any number of tokens, each of
    which sees itself and what came before.  Beyond its length the output is NaN.

    Raises `HeadsError` if `qkv_features` is not a multiple of `num_heads`, `InputRankError`,
    `MaskShapeError`, `CacheShapeError` and `AttentionShapeError` for shapes that do not fit,
    `AttentionOptionsError` for arguments that exclude one another.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer, x = nn.MultiHeadDotProductAttention(num_heads=2), jnp.ones((1, 5, 8))
    >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
    >>> y.shape, variables["params"]["query"]["kernel"].shape
    ((1, 5, 8), (8, 2, 4))
    """

    num_heads: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    qkv_features: int | None = None
    out_features: int | None = None
    broadcast_dropout: bool = True
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    precision: Precision = None
    kernel_init: Initializer = initializers.lecun_normal()
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = initializers.zeros
    out_bias_init: Initializer | None = None
    use_bias: bool = True
    attention_fn: Callable[..., Array] = dot_product_attention
    decode: bool = False
    normalize_qk: bool = False
    force_fp32_for_softmax: bool = False
    qkv_dot_general: DotGeneral | None = None
    out_dot_general: DotGeneral | None = None
    qkv_dot_general_cls: Any = None
    out_dot_general_cls: Any = None
    qk_attn_weights_einsum_cls: Callable[..., Callable[..., Array]] | None = None
    attn_weights_value_einsum_cls: Callable[..., Callable[..., Array]] | None = None
    qkv_kernel_axes: Names = field(
        default=default_names("embed", "heads", "head_dim"), kw_only=True
    )
    out_kernel_axes: Names = field(
        default=default_names("heads", "head_dim", "embed"), kw_only=True
    )
    qk_norm_axes: Names = field(default=default_names("norm"), kw_only=True)
    cache_axes: Names = field(
        default=default_names("cache_batch", "cache_length", "cache_kv_heads", "head_dim"),
        kw_only=True,
    )
    out_axes: Names | None = field(default=names.FOLLOW, kw_only=True)

    @compact
    def __call__(
        self,
        inputs_q: Array,
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        inputs_kv: Array | None = None,
        mask: Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: Array | None = None,
        sow_weights: bool = False,
    ) -> Array:
        inputs_k, inputs_v = self._sources(inputs_q, inputs_k, inputs_v, inputs_kv)
        width = inputs_q.shape[-1] if self.qkv_features is None else self.qkv_features
        check_sizes(self, num_heads=self.num_heads, qkv_features=width)
        if self.num_heads < 1 or width % self.num_heads:
            raise HeadsError(where(self), qkv_features=width, num_heads=self.num_heads)
        query = self._project("query", inputs_q, width, "length")
        key = self._project("key", inputs_k, width, "kv_length")
        value = self._project("value", inputs_v, width, "kv_length")
        if self.normalize_qk:
            query, key = self._normalize("query_ln", query), self._normalize("key_ln", key)
        filled: KVCache | None = None
        if self.decode:
            cache, existed = open_cache(self, key, value, self.cache_axes)
            if existed:
                filled = cache
                positions = cache.positions(query.shape[-3])
                seen = cache.visible(positions)
                key, value = cache.append(key, value)
                mask = combine_masks(
                    mask, jnp.broadcast_to(seen, (*query.shape[:-3], 1, *seen.shape))
                )
        options = self._options(deterministic, dropout_rng)
        if sow_weights:
            options["module"] = self
        if sow_weights or self.attention_fn is not dot_product_attention:
            y = self._attend(query, key, value, mask, options)
        else:
            y = over_keys(self._attend, query, key, value, mask, options)
        if filled is not None:
            y = filled.poison(y)
        return self._project_out(y, inputs_q.shape[-1])

    @nowrap
    def _sources(self, q: Array, k: Any, v: Any, kv: Any) -> tuple[Array, Array]:
        """Where keys and values come from."""
        place = where(self)
        if kv is not None:
            if k is not None or v is not None:
                raise AttentionOptionsError(
                    place, "give `inputs_kv`, or `inputs_k` and `inputs_v`, not both."
                )
            warnings.warn(
                "inputs_kv is deprecated; pass inputs_k (inputs_v defaults to it).",
                DeprecationWarning,
                stacklevel=3,
            )
            k = v = kv
        if k is None:
            if v is not None:
                raise AttentionOptionsError(
                    place, "`inputs_v` without `inputs_k`; give `inputs_k`, which both default to."
                )
            k = q
        v = k if v is None else v
        for what, x in (("inputs_q", q), ("inputs_k", k), ("inputs_v", v)):
            if jnp.ndim(x) < 2:
                raise InputRankError(place, what, "(*batch, length, features)", jnp.shape(x))
        return k, v

    @nowrap
    def _project(self, name: str, x: Array, width: int, length: str) -> Array:
        """The heads of `x`; `length` is the name of its length dim."""
        return DenseGeneral(
            features=(self.num_heads, width // self.num_heads),
            axis=-1,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            use_bias=self.use_bias,
            precision=self.precision,
            dot_general=self.qkv_dot_general,
            dot_general_cls=self.qkv_dot_general_cls,
            kernel_axes=self.qkv_kernel_axes,
            out_axes=_names_of_heads(tuple(self.qkv_kernel_axes), length),
            name=name,
        )(x)

    @nowrap
    def _normalize(self, name: str, x: Array) -> Array:
        return LayerNorm(
            name=name,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            scale_axes=self.qk_norm_axes,
            out_axes=None,
        )(x)

    @nowrap
    def _options(self, deterministic: bool | None, dropout_rng: Array | None) -> dict[str, Any]:
        """The keyword arguments of `attention_fn`, but for mask and module."""
        off = True
        if not 0.0 <= self.dropout_rate <= 1.0:
            raise DropoutRateError(where(self), self.dropout_rate)
        if self.dropout_rate > 0.0:
            off = merge_param("deterministic", self.deterministic, deterministic)
            if not off and dropout_rng is None:
                dropout_rng = self.make_rng("dropout")
        options: dict[str, Any] = {
            "dropout_rng": dropout_rng,
            "dropout_rate": self.dropout_rate,
            "broadcast_dropout": self.broadcast_dropout,
            "deterministic": off,
            "dtype": self.dtype,
            "precision": self.precision,
            "force_fp32_for_softmax": self.force_fp32_for_softmax,
        }
        if self.qk_attn_weights_einsum_cls is not None:
            options["qk_attn_weights_einsum"] = self.qk_attn_weights_einsum_cls()
        if self.attn_weights_value_einsum_cls is not None:
            options["attn_weights_value_einsum"] = self.attn_weights_value_einsum_cls()
        return options

    @nowrap
    def _attend(
        self, query: Array, key: Array, value: Array, mask: Array | None, options: dict[str, Any]
    ) -> Array:
        """Calls `attention_fn` with those of the arguments that it knows."""
        if self.attention_fn is dot_product_attention:
            return DotProduct(self, **options)(query, key, value, mask=mask)
        if mask is not None:
            options["mask"] = mask
        known = inspect.signature(self.attention_fn).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            asked = {
                "mask": mask is not None and "a mask was given",
                "dropout_rate": not options["deterministic"] and "there is dropout",
                "module": "module" in options and "`sow_weights` is on",
            }
            for name, why in asked.items():
                if why and name not in known:
                    raise AttentionOptionsError(
                        where(self), f"{why}, and `attention_fn` has no argument `{name}`."
                    )
            options = {name: value for name, value in options.items() if name in known}
        return self.attention_fn(query, key, value, **options)

    @nowrap
    def _project_out(self, x: Array, width: int) -> Array:
        return DenseGeneral(
            features=width if self.out_features is None else self.out_features,
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            dot_general=self.out_dot_general,
            dot_general_cls=self.out_dot_general_cls,
            kernel_axes=self.out_kernel_axes,
            out_axes=self.out_axes,
            name="out",
        )(x)


@functools.lru_cache(maxsize=256)
def _names_of_heads(kernel_axes: Names, length: str) -> Names | None:
    axes = names.activation_names(4, kernel_axes[1:])
    return None if axes is None else default_names(axes[0], length, *axes[2:])


class MultiHeadAttention(MultiHeadDotProductAttention):
    """`MultiHeadDotProductAttention` by a shorter name.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer = nn.MultiHeadAttention(num_heads=2, qkv_features=6, out_features=5)
    >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 3, 8)))[0].shape
    (1, 3, 5)
    """


class SelfAttention(MultiHeadDotProductAttention):
    """`MultiHeadDotProductAttention` of an input with itself.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer = nn.SelfAttention(num_heads=2)
    >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 3, 8)))[0].shape
    (1, 3, 8)
    """

    @compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs_q: Array,
        mask: Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: Array | None = None,
        sow_weights: bool = False,
    ) -> Array:
        return super().__call__(
            inputs_q,
            mask=mask,
            deterministic=deterministic,
            dropout_rng=dropout_rng,
            sow_weights=sow_weights,
        )
