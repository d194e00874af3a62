"""A few layers as plain functions of a scope, for the functional core.

Models are made of the modules in `shardflax.nn`; these show that the core needs none, and serve
small programs and tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from shardflax.core.scope import Scope
from shardflax.core.staging import jx

__all__ = ["batch_norm", "conv", "dense", "dropout", "layer_norm"]

jnp = jx.numpy

Init = Callable[..., Any]
_init = jax.nn.initializers
_lecun: Init = _init.lecun_normal()


def dense(
    scope: Scope,
    inputs: Any,
    features: int,
    bias: bool = True,
    dtype: Any = jnp.float32,
    precision: Any = None,
    kernel_init: Init = _lecun,
    bias_init: Init = _init.zeros,
) -> jax.Array:
    """`inputs @ kernel + bias`, over the last dim; `dtype` is that of the computation.

    >>> from shardflax.core import init
    >>> y, variables = init(dense)(jax.random.key(0), jnp.ones((2, 3)), 4)
    >>> y.shape, sorted(variables["params"])
    ((2, 4), ['bias', 'kernel'])
    """
    inputs = jnp.asarray(inputs, dtype)
    kernel = scope.param("kernel", kernel_init, (inputs.shape[-1], features))
    y = jx.lax.dot_general(
        inputs,
        jnp.asarray(kernel, dtype),
        (((inputs.ndim - 1,), (0,)), ((), ())),
        precision=precision,
    )
    return y + jnp.asarray(scope.param("bias", bias_init, (features,)), dtype) if bias else y


def conv(
    scope: Scope,
    inputs: Any,
    features: int,
    kernel_size: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Any = "SAME",
    bias: bool = True,
    dtype: Any = jnp.float32,
    kernel_init: Init = _lecun,
    bias_init: Init = _init.zeros,
) -> jax.Array:
    """A convolution of `(batch, *spatial, channels)`.

    >>> from shardflax.core import init
    >>> y, variables = init(conv)(jax.random.key(0), jnp.ones((1, 8, 8, 3)), 4, (3, 3))
    >>> y.shape, variables["params"]["kernel"].shape
    ((1, 8, 8, 4), (3, 3, 3, 4))
    """
    inputs = jnp.asarray(inputs, dtype)
    shape = (*kernel_size, inputs.shape[-1], features)
    spatial = "".join("HWDXYZ"[: len(kernel_size)])
    y = jx.lax.conv_general_dilated(
        inputs,
        jnp.asarray(scope.param("kernel", kernel_init, shape), dtype),
        strides or (1,) * len(kernel_size),
        padding,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )
    return y + jnp.asarray(scope.param("bias", bias_init, (features,)), dtype) if bias else y


def _moments(x: Any, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = x.mean(axes, keepdims=True)
    # The fast form, which is Linen's: rounding may make it negative.
    return mean, jnp.maximum(0.0, jnp.square(x).mean(axes, keepdims=True) - jnp.square(mean))


def _normalized(
    scope: Scope, x: Any, moments: tuple[Any, Any], epsilon: float, bias: bool, scale: bool
) -> jax.Array:
    mean, var = moments
    factor = jax.lax.rsqrt(var + epsilon)
    if scale:
        factor = factor * scope.param("scale", _init.ones, (x.shape[-1],))
    y = (x - mean) * factor
    return y + scope.param("bias", _init.zeros, (x.shape[-1],)) if bias else y


def layer_norm(
    scope: Scope, x: Any, epsilon: float = 1e-6, bias: bool = True, scale: bool = True
) -> jax.Array:
    """Each vector along the last dim with mean 0 and variance 1, scaled and shifted.

    >>> from shardflax.core import apply
    >>> bool(
    ...     jnp.abs(apply(layer_norm)({}, jnp.array([1.0, 3.0]), bias=False, scale=False))[0] > 0.9
    ... )
    True
    """
    return _normalized(scope, x, _moments(x, (-1,)), epsilon, bias, scale).astype(x.dtype)


def batch_norm(
    scope: Scope,
    x: Any,
    use_running_average: bool = False,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    bias: bool = True,
    scale: bool = True,
    kind: str = "batch_stats",
) -> jax.Array:
    """Each channel (the last dim) with mean 0 and variance 1 over the batch, scaled and shifted.

    Running averages are kept in the collection `kind`.

    >>> from shardflax.core import init
    >>> y, variables = init(batch_norm)(jax.random.key(0), jnp.ones((4, 3)))
    >>> sorted(variables["batch_stats"])
    ['mean', 'var']
    """
    shape = (x.shape[-1],)
    mean = scope.variable(kind, "mean", jnp.zeros, shape)
    var = scope.variable(kind, "var", jnp.ones, shape)
    if use_running_average:
        now = mean.value, var.value
    else:
        batch = _moments(x, range(x.ndim - 1))
        now = batch[0].reshape(shape), batch[1].reshape(shape)
        if not scope.get_flag("initializing", False):
            for variable, value in zip((mean, var), now, strict=True):
                variable.value = momentum * variable.value + (1 - momentum) * value
    return _normalized(scope, x, now, epsilon, bias, scale).astype(x.dtype)


def dropout(
    scope: Scope, inputs: jax.Array, rate: float, deterministic: bool = False, rng: Any = None
) -> jax.Array:
    """Zeroes a share `rate` of the inputs, with keys of the stream `dropout`, and scales the rest.

    >>> from shardflax.core import apply
    >>> apply(dropout)({}, jnp.ones(3), 0.5, deterministic=True).tolist()
    [1.0, 1.0, 1.0]
    """
    if rate == 0.0 or deterministic:
        return inputs
    rng = scope.make_rng("dropout") if rng is None else rng
    keep = jax.random.bernoulli(rng, 1.0 - rate, inputs.shape)
    return jnp.where(keep, inputs / (1.0 - rate), 0.0)
