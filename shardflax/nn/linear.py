"""Linear layers: `Dense`; the others are in files of their own, and are offered here as well."""

from __future__ import annotations

from dataclasses import field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from shardflax.core import compact, nowrap
from shardflax.core.lazy import lazily
from shardflax.nn import _names as names
from shardflax.nn import _weights as weights
from shardflax.nn import dtypes, initializers
from shardflax.nn._sizes import check_sizes
from shardflax.nn.errors import InputRankError, where
from shardflax.nn.policy import LayerBase
from shardflax.nn.types import Array, DotGeneral, Dtype, Initializer, Names, Precision
from shardflax.partitioning import default_names

# Linen's programs look for all linear layers here.
if TYPE_CHECKING:
    from shardflax.nn.conv import Conv, ConvLocal
    from shardflax.nn.conv_transpose import ConvTranspose
    from shardflax.nn.einsum import Einsum
    from shardflax.nn.embed import Embed
    from shardflax.nn.general import DenseGeneral
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "shardflax.nn.conv": "Conv ConvLocal",
            "shardflax.nn.conv_transpose": "ConvTranspose",
            "shardflax.nn.einsum": "Einsum",
            "shardflax.nn.embed": "Embed",
            "shardflax.nn.general": "DenseGeneral",
        },
        {},
    )

__all__ = [
    "Conv",
    "ConvLocal",
    "ConvTranspose",
    "Dense",
    "DenseGeneral",
    "Einsum",
    "Embed",
    "PrecisionLike",
    "choose_dot_general",
    "default_kernel_init",
]

PrecisionLike = Precision
default_kernel_init = initializers.lecun_normal()


def choose_dot_general(given: DotGeneral | None, cls: Any) -> DotGeneral:
    """What a layer multiplies with: an instance of `cls`, else the given one, else JAX's.

    >>> choose_dot_general(None, None) is lax.dot_general
    True
    """
    if cls is not None:
        return cls()
    return lax.dot_general if given is None else given


class _Plan(NamedTuple):
    """What a call needs to know of its dims and their names."""

    dimension_numbers: Any
    bias_axes: Names
    bias_shape: tuple[int, ...]
    contraction: weights.Contraction


@lru_cache(maxsize=1024, typed=True)  # typed: default names equal the same names if written
def _plan(ndim: int, kernel_axes: Names, bias_axes: Names, out_axes: Names | None) -> _Plan:
    """The plan for inputs of `ndim` dims, made once for all layers of the same names."""
    last = ndim - 1
    mapped = tuple(range(last))
    labels = (*mapped, last), (last, "f"), (*mapped, "f")
    return _Plan(
        dimension_numbers=(((last,), (0,)), ((), ())),
        bias_axes=names.like_kernel(bias_axes, kernel_axes, [-1]),
        bias_shape=(1,) * last + (-1,),
        contraction=weights.Contraction(*labels, out_axes, kernel_axes[1:]),
    )


class Dense(LayerBase):
    """A linear map of the last dim: `x @ kernel + bias`.

    Inputs `(..., in)` give `(..., features)`; parameters are `kernel` `(in, features)` and `bias`
    `(features,)`.  The computation runs in `dtype`, by default what input and parameters promote
    to.  An input without dims is an `InputRankError`.

    `bias_axes` and `out_axes` follow `kernel_axes` where they are not given: a kernel named
    `("mlp", "embed")` has a bias `("embed",)` and an output laid out like the residual stream.
    `out_axes=None` leaves the output's layout to the compiler.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer = nn.Dense(features=3)
    >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 4)))
    >>> y.shape, variables["params"]["kernel"].shape
    ((2, 3), (4, 3))
    """

    features: int
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: Precision = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = initializers.zeros
    promote_dtype: Any = dtypes.promote_dtype
    dot_general: DotGeneral | None = None
    dot_general_cls: Any = None
    kernel_axes: Names = field(default=default_names("embed", "mlp"), kw_only=True)
    bias_axes: Names = field(default=default_names("mlp"), kw_only=True)
    out_axes: Names | None = field(default=names.FOLLOW, kw_only=True)

    @compact
    def __call__(self, inputs: Array) -> Array:
        shape = jnp.shape(inputs)
        if not shape:
            raise InputRankError(where(self), "inputs", "at least 1 dim", ())
        check_sizes(self, features=self.features)
        plan = _plan(len(shape), self.kernel_axes, self.bias_axes, self.out_axes)
        kernel = self.param(
            "kernel",
            weights.named(self.kernel_init, self.kernel_axes),
            (shape[-1], self.features),
            self.param_dtype,
        )
        bias = self._bias(plan.bias_axes) if self.use_bias else None
        x, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        dot = choose_dot_general(self.dot_general, self.dot_general_cls)
        multiply = partial(dot, dimension_numbers=plan.dimension_numbers, precision=self.precision)
        stored = weights.stored_names(self.kernel_init, self.kernel_axes)
        y = weights.product(multiply, x, kernel, stored, plan.contraction, dot)
        if bias is not None:
            y = y + jnp.reshape(bias, plan.bias_shape)
        return names.output(y, self.out_axes, plan.contraction.features)

    @nowrap
    def _bias(self, axes: Names) -> Array:
        init = weights.named(self.bias_init, axes)
        bias = self.param("bias", init, (self.features,), self.param_dtype)
        return weights.bias_at_use(bias, self.bias_init, axes)
