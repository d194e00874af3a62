"""Normalization of features within each element of the batch: `GroupNorm`, `InstanceNorm`."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import jax.numpy as jnp

from shardflax.core import compact, nowrap
from shardflax.nn import _windows as windows
from shardflax.nn import initializers
from shardflax.nn._norms import Norm
from shardflax.nn.errors import AxesError, GroupsError, InputRankError, where
from shardflax.nn.types import Array, Axes, Dtype, Initializer, Names
from shardflax.partitioning import default_names

__all__ = ["GroupNorm", "InstanceNorm"]


class GroupNorm(Norm):
    """Normalizes groups of features to mean 0 and variance 1 (arXiv:1803.08494).

    The features are the last dim of an input `(batch, ..., features)`.  Either `num_groups` or
    `group_size` is given, the other is `None`.  Statistics are those of one group in one element of
    the batch, or over the dims `reduction_axes`, of which the last dim must be one; `mask`,
    `axis_name` and dtypes are as in `LayerNorm`.  Parameters are `scale` and `bias` `(features,)`.

    Both or neither of the numbers, or features that they do not divide, are a `GroupsError`, wrong
    dims an `AxesError`, a mask that does not broadcast a `MaskShapeError`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer = nn.GroupNorm(num_groups=2)
    >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.array([[1.0, 3.0, 5.0, 9.0]]))
    >>> [round(v, 2) for v in y[0].tolist()]
    [-1.0, 1.0, -1.0, 1.0]
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes | None = None
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    scale_axes: Names = field(default=default_names("norm"), kw_only=True)
    bias_axes: Names = field(default=default_names("norm"), kw_only=True)
    out_axes: Names | None = field(default=windows.BATCH_FIRST, kw_only=True)

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        x = jnp.asarray(x)
        if x.ndim == 0:
            raise InputRankError(where(self), "inputs", "(batch, ..., features)", x.shape)
        groups = self._groups(x.shape[-1])
        over = self.reduction(x, mask, self._reduced(x))
        if over.mask is not None:
            whole = jnp.broadcast_to(over.mask, (*over.mask.shape[:-1], x.shape[-1]))
            over = over._replace(mask=jnp.reshape(whole, (*whole.shape[:-1], *groups)))
        # The groups have a dim of their own where moments are taken, and only there.
        over = over._replace(dims=(*over.dims[:-1], x.ndim))
        grouped = jnp.reshape(x, (*x.shape[:-1], *groups))
        others = over.dims[:-1]
        mean, variance = (
            jnp.expand_dims(jnp.repeat(v, groups[1], axis=-1), others)
            for v in self.moments(grouped, over)
        )
        scale, bias = self.scale_and_bias(x, (x.ndim - 1,))
        y = self.normalized(x, mean, variance, scale, bias)
        return windows.Said(self.out_axes).lay_out(y)

    @nowrap
    def _groups(self, features: int) -> tuple[int, int]:
        """The number of groups and their size."""
        place, number, size = where(self), self.num_groups, self.group_size
        if number is None and size is not None:
            if size < 1 or features % size:
                raise GroupsError.indivisible(
                    place, "dim -1 of inputs", features, "group_size", size
                )
            return features // size, size
        if number is None or size is not None:
            raise GroupsError(
                place,
                f"num_groups={number} and group_size={size}: give exactly one of them, and `None` "
                "for the other (num_groups is 32 by default).",
            )
        if number < 1 or features % number:
            raise GroupsError.indivisible(place, "dim -1 of inputs", features, "num_groups", number)
        return number, features // number

    @nowrap
    def _reduced(self, x: Array) -> tuple[int, ...]:
        if self.reduction_axes is None:
            return (*range(1, x.ndim - 1), x.ndim - 1)
        dims = self.dims("reduction_axes", self.reduction_axes, x)
        if x.ndim - 1 not in dims:
            raise AxesError(
                where(self), "reduction_axes", dims, x.shape, "the last dim must be one of them"
            )
        return dims


class InstanceNorm(Norm):
    """Normalizes each feature of each element of the batch by itself (arXiv:1607.08022).

    As `LayerNorm`, with statistics over all dims but the first, the batch, and `feature_axes`.
    The batch as a dim of the features is an `AxesError`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> x = jnp.array([[[1.0, 10.0], [3.0, 20.0]]])
    >>> y, variables = nn.InstanceNorm().init_with_output(jax.random.key(0), x)
    >>> [[round(v, 2) for v in row] for row in y[0].tolist()]
    [[-1.0, -1.0], [1.0, 1.0]]
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    scale_axes: Names = field(default=default_names("norm"), kw_only=True)
    bias_axes: Names = field(default=default_names("norm"), kw_only=True)
    out_axes: Names | None = field(default=windows.BATCH_FIRST, kw_only=True)

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        x = jnp.asarray(x)
        features = self.dims("feature_axes", self.feature_axes, x)
        if 0 in features:
            raise AxesError(where(self), "feature_axes", features, x.shape, "dim 0 is the batch")
        over = self.reduction(x, mask, tuple(d for d in range(1, x.ndim) if d not in features))
        mean, variance = (jnp.expand_dims(v, over.dims) for v in self.moments(x, over))
        scale, bias = self.scale_and_bias(x, features)
        y = self.normalized(x, mean, variance, scale, bias)
        return windows.Said(self.out_axes).lay_out(y)
