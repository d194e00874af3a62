"""The transposed convolution: `ConvTranspose`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from shardflax import partitioning
from shardflax.core import compact, nowrap
from shardflax.nn import _names as names
from shardflax.nn import _weights as weights
from shardflax.nn import _windows as windows
from shardflax.nn import dtypes, initializers
from shardflax.nn._sizes import check_sizes
from shardflax.nn.conv import channels_last, masked
from shardflax.nn.errors import where
from shardflax.nn.policy import LayerBase
from shardflax.nn.types import Array, Dtype, Initializer, Names, Padding, Precision
from shardflax.partitioning import default_names

__all__ = ["ConvTranspose"]

PADDING = ("SAME", "VALID", "CIRCULAR")
UNSTRIDED = (*PADDING, "SAME_LOWER")


def _wrapped(y: Array, periods: Sequence[int], more_before: bool) -> Array:
    """`y` wrapped around to `periods`: what hangs over on both sides is added on the other side.

    `more_before`: where it cannot be the same on both sides, more hangs over before than after.
    """
    for dim, period in enumerate(periods, start=1):
        over = y.shape[dim] - period
        before = -(-over // 2) if more_before else over // 2
        low = -before % period
        turns = -(-(low + y.shape[dim]) // period)
        pads = [(0, 0)] * y.ndim
        pads[dim] = (low, turns * period - low - y.shape[dim])
        folded = jnp.reshape(jnp.pad(y, pads), (*y.shape[:dim], turns, period, *y.shape[dim + 1 :]))
        y = jnp.sum(folded, axis=dim)
    return y


class ConvTranspose(LayerBase):
    """A transposed convolution over any number of dims (`lax.conv_transpose`, features last).

    Inputs `(*batch, *spatial, in)` give `(*batch, *spatial, features)`, with a `spatial` that is
    `strides` times as large under `"SAME"` and `"CIRCULAR"` padding.  Parameters are `kernel`
    `(*kernel_size, in, features)` and `bias` `(features,)`.  With `transpose_kernel`, the kernel is
    that of the convolution whose gradient this is: `(*kernel_size, features, in)`, flipped.

    `padding` is `"SAME"`, `"VALID"`, `"CIRCULAR"` (periodic), an int, or a pair (low, high) for
    each spatial dim; without strides `"SAME_LOWER"` too.  The rest, and the errors, are those of
    `Conv`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer, x = nn.ConvTranspose(6, kernel_size=(3, 3), strides=(2, 2)), jnp.ones((1, 4, 4, 8))
    >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
    >>> y.shape, variables["params"]["kernel"].shape
    ((1, 8, 8, 6), (3, 3, 8, 6))
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = None
    padding: Padding = "SAME"
    kernel_dilation: int | Sequence[int] | None = None
    use_bias: bool = True
    mask: Any = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: Precision = None
    kernel_init: Initializer = initializers.lecun_normal()
    bias_init: Initializer = initializers.zeros
    transpose_kernel: bool = False
    promote_dtype: Any = dtypes.promote_dtype
    preferred_element_type: Dtype | None = None
    kernel_axes: Names | None = field(default=None, kw_only=True)
    bias_axes: Names | None = field(default=None, kw_only=True)
    out_axes: Names | None = field(default=windows.BATCH_FIRST, kw_only=True)

    @compact
    def __call__(self, inputs: Array) -> Array:
        check_sizes(self, features=self.features)
        place = where(self)
        size = windows.sizes(place, "kernel_size", self.kernel_size)
        ndim = len(size)
        x, batch = windows.fold_batch(place, jnp.asarray(inputs), ndim)
        strides = windows.per_dim(place, "strides", self.strides, ndim)
        axes = self._kernel_axes(x.shape[-1], ndim)
        kernel = masked(place, self._kernel(axes, size, x.shape[-1]), self.mask)
        out = -2 if self.transpose_kernel else -1
        bias = self._bias(axes, out) if self.use_bias else None
        x, kernel, bias = self.promote_dtype(x, kernel, bias, dtype=self.dtype)
        known = UNSTRIDED if set(strides) == {1} else PADDING
        padding = windows.resolve_padding(place, self.padding, ndim, known)
        circular = padding == "CIRCULAR"
        convolve = self._convolution(strides, "VALID" if circular else padding)
        stored = weights.stored_names(self.kernel_init, axes)
        labels: list[Any] = [*(f"window {dim}" for dim in range(ndim)), "in", "out"]
        if self.transpose_kernel:
            labels[-2:] = "out", "in"
        said = windows.Said(self.out_axes, axes[out], len(batch))
        y = windows.convolved(convolve, x, kernel, stored, labels, said)
        if circular:
            periods = [n * s for n, s in zip(x.shape[1:-1], strides, strict=True)]
            y = _wrapped(y, periods, self.transpose_kernel)
        if bias is not None:
            y = y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))
        y = windows.unfold_batch(y, batch)
        return said.lay_out(y)

    @nowrap
    def _convolution(self, strides: tuple[int, ...], padding: Any) -> Any:
        place, ndim = where(self), len(strides)
        return partial(
            lax.conv_transpose,
            strides=strides,
            padding=padding,
            rhs_dilation=windows.per_dim(place, "kernel_dilation", self.kernel_dilation, ndim),
            dimension_numbers=channels_last(ndim),
            transpose_kernel=self.transpose_kernel,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )

    @nowrap
    def _kernel_axes(self, channels: int, ndim: int) -> Names:
        if self.kernel_axes is not None:
            return self.kernel_axes
        last = [
            windows.channels_name("embed", channels),
            windows.channels_name("mlp", self.features),
        ]
        return default_names(*[None] * ndim, *(last[::-1] if self.transpose_kernel else last))

    @nowrap
    def _kernel(self, axes: Names, size: tuple[int, ...], channels: int) -> Array:
        ends = (channels, self.features)
        shape = (*size, *(ends[::-1] if self.transpose_kernel else ends))
        init = partitioning.named(self.kernel_init, axes)
        return self.param("kernel", init, shape, self.param_dtype)

    @nowrap
    def _bias(self, kernel_axes: Names, dim: int) -> Array:
        axes = names.like_kernel(self.bias_axes, kernel_axes, [dim])
        init = partitioning.named(self.bias_init, axes)
        bias = self.param("bias", init, (self.features,), self.param_dtype)
        return weights.bias_at_use(bias, self.bias_init, axes)
