"""Normalization over dims of the input: `LayerNorm` and `RMSNorm`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from shardflax import partitioning
from shardflax.core import Module, compact, nowrap
from shardflax.nn import _names as names
from shardflax.nn import dtypes, initializers
from shardflax.nn.errors import MaskShapeError, where
from shardflax.nn.general import canonical_dims
from shardflax.nn.types import Array, Axes, Dtype, Initializer, Names
from shardflax.partitioning import default_names

__all__ = ["LayerNorm", "RMSNorm"]


class _Reduction(NamedTuple):
    """How moments are taken: over which dims and mesh axis, of which elements, in which dtype.

    The dtype is that of the computation (of the input, where none is said), but at least float32
    unless that is turned off.
    """

    dims: tuple[int, ...]
    mask: Array | None
    axis_name: str | None
    axis_index_groups: Any
    dtype: Dtype | None
    at_least_f32: bool

    def cast(self, x: Array) -> Array:
        """`x` in the dtype of its moments."""
        dtype = x.dtype if self.dtype is None else self.dtype
        return dtypes.cast(x, jnp.promote_types(dtype, jnp.float32) if self.at_least_f32 else dtype)

    def mean(self, *xs: Array) -> list[Array]:
        """The means of `xs`, in one collective where they are spread over `axis_name`."""
        means = [jnp.mean(x, self.dims, where=self.mask) for x in xs]
        if self.axis_name is None:
            return means
        stacked = jnp.stack(means)
        return list(lax.pmean(stacked, self.axis_name, axis_index_groups=self.axis_index_groups))


def _squared(x: Array) -> Array:
    """|x|^2, real also where `x` is complex."""
    if jnp.iscomplexobj(x):
        return lax.square(lax.real(x)) + lax.square(lax.imag(x))
    return lax.square(x)


def _fast_moments(x: Array, over: _Reduction) -> tuple[Array, Array]:
    """Mean and variance in one pass, as E|x|^2 - |E x|^2, which rounding may not take below 0."""
    mean, square = over.mean(x, _squared(x))
    return mean, jnp.maximum(0.0, square - _squared(mean))


def _exact_moments(x: Array, over: _Reduction) -> tuple[Array, Array]:
    """Mean and variance in two passes, as E|x - E x|^2."""
    (mean,) = over.mean(x)
    (variance,) = over.mean(_squared(x - jnp.expand_dims(mean, over.dims)))
    return mean, variance


class _Norm(Module):
    """What both layers share: the parameters, which lie along `feature_axes`."""

    @nowrap
    def reduction(self, x: Array, mask: Array | None) -> _Reduction:
        this: Any = self
        place = where(self)
        if mask is not None and not _broadcasts(jnp.shape(mask), x.shape):
            raise MaskShapeError(place, "mask", jnp.shape(mask), x.shape)
        return _Reduction(
            dims=canonical_dims(place, "reduction_axes", this.reduction_axes, x.shape),
            mask=mask,
            axis_name=this.axis_name,
            axis_index_groups=this.axis_index_groups,
            dtype=this.dtype,
            at_least_f32=this.force_float32_reductions,
        )

    @nowrap
    def along_features(self, name: str, init: Initializer, axes: Names, x: Array) -> Array:
        """The parameter `name`, shaped to broadcast against `x`."""
        this: Any = self
        dims = canonical_dims(where(self), "feature_axes", this.feature_axes, x.shape)
        if names.is_default(axes) and len(axes) < len(dims):
            axes = default_names(*axes, *[None] * (len(dims) - len(axes)))
        shape = tuple(x.shape[d] for d in dims)
        value = self.param(name, partitioning.named(init, axes), shape, this.param_dtype)
        return jnp.reshape(value, [x.shape[d] if d in dims else 1 for d in range(x.ndim)])


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(a in (1, b) for a, b in pairs)


class LayerNorm(_Norm):
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
        over = self.reduction(x, mask)
        moments = _fast_moments if self.use_fast_variance else _exact_moments
        mean, variance = moments(over.cast(x), over)
        y = x - jnp.expand_dims(mean, over.dims)
        factor = lax.rsqrt(jnp.expand_dims(variance, over.dims) + self.epsilon)
        scale = bias = None
        if self.use_scale:
            scale = self.along_features("scale", self.scale_init, self.scale_axes, x)
            factor = factor * scale
        y = y * factor
        if self.use_bias:
            bias = self.along_features("bias", self.bias_init, self.bias_axes, x)
            y = y + bias
        y = dtypes.cast(y, dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype))
        return names.output(y, self.out_axes)


class RMSNorm(_Norm):
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
        over = self.reduction(x, mask)
        (square,) = over.mean(_squared(over.cast(x)))
        factor = lax.rsqrt(jnp.expand_dims(square, over.dims) + self.epsilon)
        scale = None
        if self.use_scale:
            scale = self.along_features("scale", self.scale_init, self.scale_axes, x)
            factor = factor * scale
        y = dtypes.cast(x * factor, dtypes.canonicalize_dtype(x, scale, dtype=self.dtype))
        return names.output(y, self.out_axes)
