"""What the norms share: moments over dims of the input, and parameters along others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from shardflax.core import nowrap
from shardflax.nn import _names as names
from shardflax.nn import _weights as weights
from shardflax.nn import dtypes
from shardflax.nn.errors import MaskShapeError, where
from shardflax.nn.general import canonical_dims
from shardflax.nn.policy import LayerBase
from shardflax.nn.types import Array, Axes, Dtype, Initializer, Names
from shardflax.partitioning import default_names


class Reduction(NamedTuple):
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
        if self.at_least_f32 and dtype not in _WIDE:
            dtype = jnp.promote_types(dtype, jnp.float32)
        return dtypes.cast(x, dtype)

    def mean(self, *xs: Array) -> list[Array]:
        """The means of `xs`, in one collective where they are spread over `axis_name`."""
        means = [jnp.mean(x, self.dims, where=self.mask) for x in xs]
        if self.axis_name is None:
            return means
        stacked = jnp.stack(means)
        return list(lax.pmean(stacked, self.axis_name, axis_index_groups=self.axis_index_groups))


# What JAX would find out with every call: these promote to themselves.
_WIDE = frozenset(np.dtype(d) for d in ("float32", "float64", "complex64", "complex128"))


def squared(x: Array) -> Array:
    """|x|^2, real also where `x` is complex."""
    if x.dtype.kind == "c":
        return lax.square(lax.real(x)) + lax.square(lax.imag(x))
    return lax.square(x)


def fast_moments(x: Array, over: Reduction) -> tuple[Array, Array]:
    """Mean and variance in one pass, as E|x|^2 - |E x|^2, which rounding may not take below 0."""
    mean, square = over.mean(x, squared(x))
    return mean, jnp.maximum(0.0, square - squared(mean))


def exact_moments(x: Array, over: Reduction) -> tuple[Array, Array]:
    """Mean and variance in two passes, as E|x - E x|^2."""
    (mean,) = over.mean(x)
    (variance,) = over.mean(squared(x - jnp.expand_dims(mean, over.dims)))
    return mean, variance


class Norm(LayerBase):
    """What the norms share: how moments are taken, and what is done with them.

    Subclasses have the fields that are read here through `this`.
    """

    @nowrap
    def reduction(self, x: Array, mask: Array | None, dims: tuple[int, ...]) -> Reduction:
        this: Any = self
        if mask is not None and not broadcasts(jnp.shape(mask), x.shape):
            raise MaskShapeError(where(self), "mask", jnp.shape(mask), x.shape)
        return Reduction(
            dims=dims,
            mask=None if mask is None else jnp.asarray(mask, bool),  # masks of numbers, too
            axis_name=this.axis_name,
            axis_index_groups=this.axis_index_groups,
            dtype=this.dtype,
            at_least_f32=this.force_float32_reductions,
        )

    @nowrap
    def moments(self, x: Array, over: Reduction) -> tuple[Array, Array]:
        """Mean and variance of `x`, without the dims that they are taken over."""
        this: Any = self
        take = fast_moments if this.use_fast_variance else exact_moments
        return take(over.cast(x), over)

    @nowrap
    def dims(self, field: str, given: Axes, x: Array) -> tuple[int, ...]:
        return canonical_dims(self, field, given, x.shape)

    @nowrap
    def along(
        self, name: str, init: Initializer, axes: Names, x: Array, dims: tuple[int, ...]
    ) -> Array:
        """The parameter `name` along `dims` of `x`, shaped to broadcast against it."""
        this: Any = self
        sizes = x.shape
        shape = tuple([sizes[d] for d in dims])
        init = weights.named(init, for_rank(axes, len(dims)))
        value = self.param(name, init, shape, this.param_dtype)
        return jnp.reshape(value, [size if d in dims else 1 for d, size in enumerate(sizes)])

    @nowrap
    def scale_and_bias(self, x: Array, dims: tuple[int, ...]) -> tuple[Array | None, Array | None]:
        """The parameters along `dims` of `x`; `None` for those that the layer does not use."""
        this: Any = self
        scale = bias = None
        if this.use_scale:
            scale = self.along("scale", this.scale_init, this.scale_axes, x, dims)
        if this.use_bias:
            bias = self.along("bias", this.bias_init, this.bias_axes, x, dims)
        return scale, bias

    @nowrap
    def normalized(
        self, x: Array, mean: Array, variance: Array, scale: Array | None, bias: Array | None
    ) -> Array:
        """`(x - mean) / sqrt(variance + epsilon) * scale + bias`; all broadcast against `x`."""
        this: Any = self
        y = x - mean
        factor = lax.rsqrt(variance + this.epsilon)
        if scale is not None:
            factor = factor * scale
        y = y * factor
        if bias is not None:
            y = y + bias
        return dtypes.cast(y, dtypes.canonicalize_dtype(x, scale, bias, dtype=this.dtype))


def for_rank(axes: Names, rank: int) -> Names:
    """Default names, made for one dim, for several."""
    if len(axes) < rank and names.is_default(axes):
        return default_names(*axes, *[None] * (rank - len(axes)))
    return axes


def broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    """True if an array of `shape` broadcasts to `target`."""
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(a in (1, b) for a, b in pairs)
