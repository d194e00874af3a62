"""Initializers: those of `jax.nn.initializers`, as values that compare and hash.

Each draws exactly the numbers of the function that it is named after.  Two that were made alike
are equal, so that whatever is known about one (the shape it gives, a compiled initialisation) is
known about the other.

>>> normal(0.02) == normal(0.02), normal(0.02) == normal(0.01)
(True, False)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from jax.nn.initializers import ones, zeros

from shardflax.nn._recipes import (
    Constant,
    DeltaOrthogonal,
    Distribution,
    Mode,
    Normal,
    Orthogonal,
    TruncatedNormal,
    Uniform,
    VarianceScaling,
)
from shardflax.nn.types import Array, Axes, Dtype

__all__ = [
    "Initializer",
    "constant",
    "delta_orthogonal",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "kaiming_normal",
    "kaiming_uniform",
    "lecun_normal",
    "lecun_uniform",
    "normal",
    "ones",
    "ones_init",
    "orthogonal",
    "truncated_normal",
    "uniform",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
    "zeros_init",
]


class Initializer(Protocol):
    """What draws a parameter: `init(key, shape, dtype)`, an array.

    >>> import jax
    >>> draw: Initializer = zeros_init()
    >>> draw(jax.random.key(0), (2,)).shape
    (2,)
    """

    def __call__(
        self, key: Any, shape: Sequence[int], dtype: Dtype | None = None, out_sharding: Any = None
    ) -> Array: ...


def zeros_init() -> Initializer:
    """The initializer `zeros`.

    >>> zeros_init() is zeros
    True
    """
    return zeros


def ones_init() -> Initializer:
    """The initializer `ones`.

    >>> ones_init() is ones
    True
    """
    return ones


def constant(value: Any, dtype: Dtype | None = None) -> Initializer:
    """Fills with `value`, a scalar or an array that broadcasts to the shape.

    >>> import jax
    >>> constant(3.0)(jax.random.key(0), (2,)).tolist()
    [3.0, 3.0]
    """
    return Constant(value, dtype)


def uniform(scale: float = 1e-2, dtype: Dtype | None = None) -> Initializer:
    """Uniform over [0, scale).

    >>> uniform(0.5)
    Uniform(scale=0.5, dtype=None)
    """
    return Uniform(scale, dtype)


def normal(stddev: float = 1e-2, dtype: Dtype | None = None) -> Initializer:
    """Normal with mean 0 and standard deviation `stddev`.

    >>> normal(0.02)
    Normal(stddev=0.02, dtype=None)
    """
    return Normal(stddev, dtype)


def truncated_normal(
    stddev: float = 1e-2, dtype: Dtype | None = None, lower: float = -2.0, upper: float = 2.0
) -> Initializer:
    """Normal, cut off at `lower` and `upper` standard deviations (not rescaled for the cut).

    >>> truncated_normal(0.5, upper=1.0)
    TruncatedNormal(stddev=0.5, dtype=None, lower=-2.0, upper=1.0)
    """
    return TruncatedNormal(stddev, dtype, lower, upper)


def variance_scaling(
    scale: float,
    mode: Mode,
    distribution: Distribution,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    dtype: Dtype | None = None,
) -> Initializer:
    """Mean 0 and variance `scale / n`, with n the fan in, the fan out or a mean of the two.

    >>> variance_scaling(1.0, "fan_in", "normal") == variance_scaling(1.0, "fan_in", "normal")
    True
    """
    return VarianceScaling(scale, mode, distribution, in_axis, out_axis, batch_axis, dtype)


def lecun_normal(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: Dtype | None = None
) -> Initializer:
    """Truncated normal of variance 1 / fan_in (LeCun et al. 1998, Efficient BackProp).

    >>> lecun_normal() == variance_scaling(1.0, "fan_in", "truncated_normal")
    True
    """
    return VarianceScaling(1.0, "fan_in", "truncated_normal", in_axis, out_axis, batch_axis, dtype)


def lecun_uniform(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: Dtype | None = None
) -> Initializer:
    """Uniform of variance 1 / fan_in (LeCun et al. 1998, Efficient BackProp).

    >>> lecun_uniform() == variance_scaling(1.0, "fan_in", "uniform")
    True
    """
    return VarianceScaling(1.0, "fan_in", "uniform", in_axis, out_axis, batch_axis, dtype)


def glorot_normal(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: Dtype | None = None
) -> Initializer:
    """Truncated normal of variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010).

    >>> glorot_normal() == xavier_normal()
    True
    """
    return VarianceScaling(1.0, "fan_avg", "truncated_normal", in_axis, out_axis, batch_axis, dtype)


def glorot_uniform(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: Dtype | None = None
) -> Initializer:
    """Uniform of variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010).

    >>> glorot_uniform() == xavier_uniform()
    True
    """
    return VarianceScaling(1.0, "fan_avg", "uniform", in_axis, out_axis, batch_axis, dtype)


def he_normal(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: Dtype | None = None
) -> Initializer:
    """Truncated normal of variance 2 / fan_in (He et al. 2015, arXiv:1502.01852).

    >>> he_normal() == kaiming_normal()
    True
    """
    return VarianceScaling(2.0, "fan_in", "truncated_normal", in_axis, out_axis, batch_axis, dtype)


def he_uniform(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: Dtype | None = None
) -> Initializer:
    """Uniform of variance 2 / fan_in (He et al. 2015, arXiv:1502.01852).

    >>> he_uniform() == kaiming_uniform()
    True
    """
    return VarianceScaling(2.0, "fan_in", "uniform", in_axis, out_axis, batch_axis, dtype)


xavier_normal = glorot_normal
xavier_uniform = glorot_uniform
kaiming_normal = he_normal
kaiming_uniform = he_uniform


def orthogonal(
    scale: float = 1.0, column_axis: int = -1, dtype: Dtype | None = None
) -> Initializer:
    """Orthogonal matrices, times `scale`; the columns run along `column_axis`.

    >>> import jax
    >>> orthogonal()(jax.random.key(0), (3, 3)).shape
    (3, 3)
    """
    return Orthogonal(scale, column_axis, dtype)


def delta_orthogonal(
    scale: float = 1.0, column_axis: int = -1, dtype: Dtype | None = None
) -> Initializer:
    """Convolution kernels that are orthogonal at their centre, else 0 (arXiv:1806.05393).

    Takes shapes of 3 to 5 dims whose last two are `in <= out`.

    >>> import jax
    >>> delta_orthogonal()(jax.random.key(0), (3, 2, 4)).shape
    (3, 2, 4)
    """
    return DeltaOrthogonal(scale, column_axis, dtype)
