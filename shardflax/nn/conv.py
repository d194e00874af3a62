"""Convolutions: `Conv`, and `ConvLocal` with a kernel of its own at every place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from shardflax import partitioning
from shardflax.core import compact, nowrap
from shardflax.nn import _names as names
from shardflax.nn import _weights as weights
from shardflax.nn import _windows as windows
from shardflax.nn import dtypes, initializers
from shardflax.nn._sizes import check_sizes
from shardflax.nn.errors import GroupsError, KernelMaskError, WindowError, where
from shardflax.nn.policy import LayerBase
from shardflax.nn.types import Array, Dtype, Initializer, Names, Padding, Precision
from shardflax.partitioning import default_names

__all__ = ["Conv", "ConvLocal", "channels_last", "masked"]

PADDING = (*windows.LAX_PADDING, "CIRCULAR", "REFLECT", "CAUSAL")


def channels_last(ndim: int) -> lax.ConvDimensionNumbers:
    """The order of dims in a convolution over `ndim` dims: features last, in all operands.

    >>> channels_last(1)
    ConvDimensionNumbers(lhs_spec=(0, 2, 1), rhs_spec=(2, 1, 0), out_spec=(0, 2, 1))
    """
    data = (0, ndim + 1, *range(1, ndim + 1))
    return lax.ConvDimensionNumbers(data, (ndim + 1, ndim, *range(ndim)), data)


def masked(place: str, kernel: Array, mask: Any) -> Array:
    """`kernel * mask`; a mask of another shape is a `KernelMaskError`.

    >>> import jax.numpy as jnp
    >>> masked("Conv", jnp.ones((1, 1, 2)), jnp.array([[[True, False]]])).tolist()
    [[[1.0, 0.0]]]
    """
    if mask is None:
        return kernel
    if jnp.shape(mask) != jnp.shape(kernel):
        raise KernelMaskError(place, jnp.shape(mask), jnp.shape(kernel))
    boolean = jnp.result_type(mask) == jnp.bool_
    return kernel * (dtypes.cast(mask, kernel.dtype) if boolean else mask)


@dataclass(frozen=True)
class _Window:
    """The geometry of one layer, a number for each windowed dim."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]

    @property
    def options(self) -> dict[str, Any]:
        """What every convolution of JAX is called with."""
        return {
            "lhs_dilation": self.input_dilation,
            "rhs_dilation": self.kernel_dilation,
            "dimension_numbers": channels_last(len(self.size)),
        }

    def pad(self, place: str, x: Array) -> tuple[Array, Any]:
        """`x` and the padding left to be done: JAX's convolutions know none of these three."""
        if isinstance(self.padding, str) and any(d > 1 for d in self.input_dilation):
            raise WindowError(
                place,
                f"input_dilation={self.input_dilation} with padding={self.padding!r}: say the "
                "padding of a dilated input in numbers, a pair (low, high) for each dim.",
            )
        if self.padding == "CAUSAL":
            if len(self.size) != 1:
                found = f"kernel_size has {len(self.size)}"
                raise WindowError(place, f"padding='CAUSAL' is for windows of one dim; {found}.")
            before = self.kernel_dilation[0] * (self.size[0] - 1)
            return jnp.pad(x, [(0, 0), (before, 0), (0, 0)]), "VALID"
        modes = {"CIRCULAR": "wrap", "REFLECT": "reflect"}
        if isinstance(self.padding, str) and self.padding in modes:
            reach = [(k - 1) * d for k, d in zip(self.size, self.kernel_dilation, strict=True)]
            for dim, (size, r) in enumerate(zip(x.shape[1:-1], reach, strict=True)):
                if size == 0 < r:
                    why = f"nothing to pad with, dim {dim + 1 - x.ndim} of inputs has size 0."
                    raise WindowError(place, f"padding={self.padding!r}: {why}")
            around = [(0, 0), *[(r // 2, r - r // 2) for r in reach], (0, 0)]
            return jnp.pad(x, around, mode=modes[self.padding]), "VALID"
        return x, self.padding


@dataclass(frozen=True)
class _Plan:
    """A function of input and kernel, the shapes of kernel and bias, and the kernel's dims."""

    convolve: Callable[..., Array]
    kernel_shape: tuple[int, ...]
    bias_shape: tuple[int, ...]
    labels: tuple[Any, ...]


class _Conv(LayerBase):
    """What both layers share: all but the kernel's shape and how it is applied."""

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: Padding = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    mask: Any = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: Precision = None
    kernel_init: Initializer = initializers.lecun_normal()
    bias_init: Initializer = initializers.zeros
    promote_dtype: Any = dtypes.promote_dtype
    conv_general_dilated: Callable[..., Array] | None = None
    conv_general_dilated_cls: Any = None
    kernel_axes: Names | None = field(default=None, kw_only=True)
    bias_axes: Names | None = field(default=None, kw_only=True)
    out_axes: Names | None = field(default=windows.BATCH_FIRST, kw_only=True)

    @compact
    def __call__(self, inputs: Array) -> Array:
        check_sizes(self, features=self.features)
        place, window = where(self), self.window()
        x, batch = windows.fold_batch(place, jnp.asarray(inputs), len(window.size))
        self.check_groups(place, x.shape[-1])
        x, padding = window.pad(place, x)
        conv = self.conv()
        plan = self.plan(conv, window, padding, x)
        axes = self.kernel_axes
        if axes is None:
            axes = self.default_axes(x.shape[-1], len(plan.kernel_shape))
        init = partitioning.named(self.kernel_init, axes)
        kernel = self.param("kernel", init, plan.kernel_shape, self.param_dtype)
        kernel = masked(place, kernel, self.mask)
        bias = self.bias(axes, plan.bias_shape) if self.use_bias else None
        x, kernel, bias = self.promote_dtype(x, kernel, bias, dtype=self.dtype)
        stored = weights.stored_names(self.kernel_init, axes)
        said = windows.Said(self.out_axes, axes[-1], len(batch))
        y = windows.convolved(plan.convolve, x, kernel, stored, plan.labels, said, conv)
        if bias is not None:
            y = y + jnp.reshape(bias, (1,) * (y.ndim - bias.ndim) + bias.shape)
        return said.lay_out(windows.unfold_batch(y, batch))

    @nowrap
    def window(self) -> _Window:
        place = where(self)
        size = windows.sizes(place, "kernel_size", self.kernel_size)
        ndim = len(size)
        return _Window(
            size=size,
            strides=windows.per_dim(place, "strides", self.strides, ndim),
            input_dilation=windows.per_dim(place, "input_dilation", self.input_dilation, ndim),
            kernel_dilation=windows.per_dim(place, "kernel_dilation", self.kernel_dilation, ndim),
            padding=windows.resolve_padding(place, self.padding, ndim, PADDING),
        )

    @nowrap
    def check_groups(self, place: str, channels: int) -> None:
        groups = self.feature_group_count
        for what, size in (("dim -1 of inputs", channels), ("features", self.features)):
            if groups < 1 or size % groups:
                raise GroupsError.indivisible(place, what, size, "feature_group_count", groups)

    @nowrap
    def conv(self) -> Callable[..., Array]:
        """What this layer convolves with: an instance of the given class, else what was given."""
        if self.conv_general_dilated_cls is not None:
            return self.conv_general_dilated_cls()
        return self.conv_general_dilated or lax.conv_general_dilated

    @nowrap
    def default_axes(self, channels: int, ndim: int) -> Names:
        """The kernel's features are named as those of `Dense`, unless they are an image's."""
        ins = windows.channels_name("embed", channels) if self.feature_group_count == 1 else None
        outs = windows.channels_name("mlp", self.features)
        if self.in_groups(channels):
            outs = None  # it cannot be cut along its features: see `windows.PerPart`
        return default_names(*[None] * (ndim - 2), ins, outs)

    @nowrap
    def in_groups(self, channels: int) -> bool:
        """Whether there are several groups, of several channels each."""
        return 1 < self.feature_group_count < channels

    @nowrap
    def bias(self, kernel_axes: Names, shape: tuple[int, ...]) -> Array:
        dims = range(len(kernel_axes))
        axes = names.like_kernel(
            self.bias_axes, kernel_axes, [*dims[: len(shape) - 1], len(kernel_axes) - 1]
        )
        value = self.param(
            "bias", partitioning.named(self.bias_init, axes), shape, self.param_dtype
        )
        return weights.bias_at_use(value, self.bias_init, axes)

    @nowrap
    def plan(self, conv: Callable[..., Array], window: _Window, padding: Any, x: Array) -> _Plan:
        """How inputs like `x` are convolved."""
        raise AssertionError("overridden by each convolution")


class Conv(_Conv):
    """A convolution over any number of dims (`lax.conv_general_dilated`, features last).

    Inputs `(*batch, *spatial, in)` give `(*batch, *spatial, features)`; `kernel_size` has an entry
    for each spatial dim, and a single int is one of one dim.  Parameters are `kernel`
    `(*kernel_size, in / feature_group_count, features)` and `bias` `(features,)`.  An input
    without a batch dim, or with several, is convolved as if it had one.  The computation runs in
    `dtype`, by default what input and parameters promote to.

    `padding` is `"SAME"`, `"SAME_LOWER"`, `"VALID"`, `"CIRCULAR"` (periodic), `"REFLECT"`,
    `"CAUSAL"` (one dim: no place sees a later one), an int, or a pair (low, high) for each
    spatial dim.  `mask`, of the kernel's shape, is multiplied with the kernel.

    `kernel_axes=None` names the kernel's last two dims `"embed"` and `"mlp"`, as `Dense` does, but
    for up to four channels (an image's) and for the inputs of groups; spatial dims have no name.
    The output's first dim is the batch, its last one follows the kernel; the rest is left to the
    compiler, as is all of it with `out_axes=None`.

    Raises `InputRankError`, `WindowError` (what does not match the window), `PaddingError`,
    `GroupsError` (groups that do not divide the features) and `KernelMaskError`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer, x = nn.Conv(features=6, kernel_size=(3, 3), strides=2), jnp.ones((1, 8, 8, 3))
    >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
    >>> y.shape, variables["params"]["kernel"].shape
    ((1, 4, 4, 6), (3, 3, 3, 6))
    """

    @nowrap
    def plan(self, conv: Callable[..., Array], window: _Window, padding: Any, x: Array) -> _Plan:
        groups = self.feature_group_count

        def convolve(x: Array, kernel: Any) -> Array:
            return conv(
                x,
                kernel,
                window.strides,
                padding,
                **window.options,
                feature_group_count=groups,
                precision=self.precision,
            )

        if conv is lax.conv_general_dilated and self.in_groups(x.shape[-1]):
            convolve = windows.PerPart(convolve)
        kernel_shape = (*window.size, x.shape[-1] // groups, self.features)
        labels = tuple(f"window {dim}" for dim in range(len(window.size)))
        return _Plan(convolve, kernel_shape, (self.features,), (*labels, "in", "out"))


class ConvLocal(_Conv):
    """A convolution whose kernel is another one at each place (`conv_general_dilated_local`).

    As `Conv`, with the parameters `kernel`
    `(*output_spatial, prod(kernel_size) * in, features)` and `bias` `(*output_spatial, features)`,
    and without groups (a `GroupsError`).  A given `conv_general_dilated` is asked for the output's
    shape alone.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer, x = nn.ConvLocal(features=6, kernel_size=3, padding="VALID"), jnp.ones((1, 8, 2))
    >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
    >>> y.shape, variables["params"]["kernel"].shape
    ((1, 6, 6), (6, 6, 6))
    """

    @nowrap
    def check_groups(self, place: str, channels: int) -> None:
        if self.feature_group_count != 1:
            raise GroupsError(
                place, f"feature_group_count={self.feature_group_count}: only 1 is possible here."
            )

    @nowrap
    def plan(self, conv: Callable[..., Array], window: _Window, padding: Any, x: Array) -> _Plan:
        inputs = jax.ShapeDtypeStruct(x.shape, x.dtype)
        kernel = jax.ShapeDtypeStruct((*window.size, x.shape[-1], self.features), x.dtype)
        fixed = {"window_strides": window.strides, "padding": padding, **window.options}
        spatial = jax.eval_shape(partial(conv, **fixed), inputs, kernel).shape[1:-1]
        convolve = partial(
            lax.conv_general_dilated_local,
            **fixed,
            filter_shape=window.size,
            precision=self.precision,
        )
        kernel_shape = (*spatial, prod(window.size) * x.shape[-1], self.features)
        labels = (*range(len(spatial)), "in", "out")
        return _Plan(convolve, kernel_shape, (*spatial, self.features), labels)
