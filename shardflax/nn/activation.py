"""Activation functions: those of `jax.nn`, under the names of Linen, and `PReLU`, which learns.

>>> import shardflax.nn as nn
>>> float(nn.relu(-1.0)), float(nn.swish(0.0))
(0.0, 0.0)
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

import jax.numpy as jnp
from jax.nn import (
    celu,
    elu,
    gelu,
    glu,
    hard_sigmoid,
    hard_silu,
    hard_swish,
    hard_tanh,
    identity,
    leaky_relu,
    log_sigmoid,
    log_softmax,
    logsumexp,
    mish,
    one_hot,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    soft_sign,
    softmax,
    softplus,
    sparse_plus,
    sparse_sigmoid,
    squareplus,
    standardize,
    swish,
    tanh,
)

from shardflax import partitioning
from shardflax.core import compact
from shardflax.nn import dtypes, initializers
from shardflax.nn.policy import LayerBase
from shardflax.nn.types import Array, Dtype, Names
from shardflax.partitioning import default_names

normalize = standardize

__all__ = [
    "PReLU",
    "celu",
    "elu",
    "gelu",
    "glu",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "identity",
    "leaky_relu",
    "log_sigmoid",
    "log_softmax",
    "logsumexp",
    "mish",
    "normalize",
    "one_hot",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "soft_sign",
    "softmax",
    "softplus",
    "sparse_plus",
    "sparse_sigmoid",
    "squareplus",
    "standardize",
    "swish",
    "tanh",
]


class PReLU(LayerBase):
    """`x` where it is positive, else `x` times a learned slope (arXiv:1502.01852).

    The parameter `negative_slope`, one number, begins at `negative_slope_init`.  The output has the
    shape and dtype of the input.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> y, variables = nn.PReLU().init_with_output(jax.random.key(0), jnp.array([-1.0, 2.0]))
    >>> [round(v, 2) for v in y.tolist()]
    [-0.01, 2.0]
    """

    param_dtype: Dtype = jnp.float32
    negative_slope_init: float = 0.01
    slope_axes: Names = field(default=default_names(), kw_only=True)

    @compact
    def __call__(self, inputs: Array) -> Array:
        init: Any = initializers.constant(self.negative_slope_init)
        init = partitioning.named(init, self.slope_axes)
        slope = self.param("negative_slope", init, (), self.param_dtype)
        x = jnp.asarray(inputs)
        return jnp.where(x >= 0, x, dtypes.cast(slope, x.dtype) * x)
