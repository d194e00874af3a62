"""Normalization of each element of the batch by itself: `LayerNorm` and `RMSNorm`."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import jax.numpy as jnp
from jax import lax

from shardflax.core import compact
from shardflax.nn import _names as names
from shardflax.nn import dtypes, initializers
from shardflax.nn._norms import Norm, squared
from shardflax.nn.types import Array, Axes, Dtype, Initializer, Names
from shardflax.partitioning import default_names

__all__ = ["LayerNorm", "RMSNorm"]


class LayerNorm(Norm):
    """Normalizes to mean 0 and variance 1 over `reduction_axes` (arXiv:1607.06450).

    The output has the input's shape, in `dtype`, by default what input and parameters promote to.
    Parameters `scale` and `bias` have the sizes of `feature_axes`.  Statistics are taken in at
    least float32 (unless `force_float32_reductions=False`), over the elements where `mask` is
    true, and over the axis `axis_name` too where one is given.  `use_fast_variance` computes the
    variance in one pass.  Dims that do not exist are an `AxesError`, a mask that does not
    broadcast a `MaskShapeError`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> y, variables = nn.LayerNorm().init_with_output(jax.random.key(0), jnp.arange(4.0))
    >>> [round(v, 2) for v in y.tolist()]
    [-1.34, -0.45, 0.45, 1.34]
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    scale_axes: Names = field(default=default_names("norm"), kw_only=True)
    bias_axes: Names = field(default=default_names("norm"), kw_only=True)
    out_axes: Names | None = field(default=names.RESIDUAL, kw_only=True)

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        x = jnp.asarray(x)
        over = self.reduction(x, mask, self.dims("reduction_axes", self.reduction_axes, x))
        mean, variance = self.moments(x, over)
        scale, bias = self.scale_and_bias(x, self.dims("feature_axes", self.feature_axes, x))
        mean, variance = jnp.expand_dims(mean, over.dims), jnp.expand_dims(variance, over.dims)
        return names.output(self.normalized(x, mean, variance, scale, bias), self.out_axes)


class RMSNorm(Norm):
    """Divides by the root mean square over `reduction_axes` (arXiv:1910.07467).

    As `LayerNorm`, without the mean and without a bias.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> y, variables = nn.RMSNorm().init_with_output(jax.random.key(0), jnp.array([3.0, 4.0]))
    >>> [round(v, 2) for v in y.tolist()]
    [0.85, 1.13]
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    scale_axes: Names = field(default=default_names("norm"), kw_only=True)
    out_axes: Names | None = field(default=names.RESIDUAL, kw_only=True)

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        x = jnp.asarray(x)
        over = self.reduction(x, mask, self.dims("reduction_axes", self.reduction_axes, x))
        (square,) = over.mean(squared(over.cast(x)))
        factor = lax.rsqrt(jnp.expand_dims(square, over.dims) + self.epsilon)
        scale = None
        if self.use_scale:
            dims = self.dims("feature_axes", self.feature_axes, x)
            scale = self.along("scale", self.scale_init, self.scale_axes, x, dims)
            factor = factor * scale
        y = dtypes.cast(x * factor, dtypes.canonicalize_dtype(x, scale, dtype=self.dtype))
        return names.output(y, self.out_axes)
