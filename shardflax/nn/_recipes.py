"""Initializers by their arguments: frozen dataclasses that call the function of JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from jax.nn import initializers as jax_init

from shardflax.nn.types import Array, Axes, Dtype

Mode = Literal["fan_in", "fan_out", "fan_avg", "fan_geo_avg"]
Distribution = Literal["truncated_normal", "normal", "uniform"]


class _Recipe:
    """An initializer by its arguments; subclasses are frozen dataclasses of them."""

    def __call__(
        self, key: Any, shape: Sequence[int], dtype: Dtype | None = None, out_sharding: Any = None
    ) -> Array:
        layout = {} if out_sharding is None else {"out_sharding": out_sharding}
        args = () if dtype is None else (dtype,)
        return _draw(self)(key, tuple(shape), *args, **layout)


def _factory(recipe: Any) -> Any:
    """The function of JAX that a recipe stands for, called with the recipe's fields."""
    fields = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    if fields.get("dtype", 0) is None:
        del fields["dtype"]
    return getattr(jax_init, recipe.jax_name)(**fields)


_draw = lru_cache(maxsize=1024)(_factory)


@dataclasses.dataclass(frozen=True)
class Uniform(_Recipe):
    """See `shardflax.nn.initializers.uniform`."""

    scale: float = 1e-2
    dtype: Dtype | None = None
    jax_name = "uniform"


@dataclasses.dataclass(frozen=True)
class Normal(_Recipe):
    """See `shardflax.nn.initializers.normal`."""

    stddev: float = 1e-2
    dtype: Dtype | None = None
    jax_name = "normal"


@dataclasses.dataclass(frozen=True)
class TruncatedNormal(_Recipe):
    """See `shardflax.nn.initializers.truncated_normal`."""

    stddev: float = 1e-2
    dtype: Dtype | None = None
    lower: float = -2.0
    upper: float = 2.0
    jax_name = "truncated_normal"


@dataclasses.dataclass(frozen=True)
class VarianceScaling(_Recipe):
    """See `shardflax.nn.initializers.variance_scaling`."""

    scale: float
    mode: Mode
    distribution: Distribution
    in_axis: Axes = -2
    out_axis: Axes = -1
    batch_axis: Axes = ()
    dtype: Dtype | None = None
    jax_name = "variance_scaling"

    def __post_init__(self) -> None:
        for field in ("in_axis", "out_axis", "batch_axis"):
            value = getattr(self, field)
            if isinstance(value, Sequence):
                object.__setattr__(self, field, tuple(value))


@dataclasses.dataclass(frozen=True)
class Orthogonal(_Recipe):
    """See `shardflax.nn.initializers.orthogonal`."""

    scale: float = 1.0
    column_axis: int = -1
    dtype: Dtype | None = None
    jax_name = "orthogonal"


@dataclasses.dataclass(frozen=True)
class DeltaOrthogonal(_Recipe):
    """See `shardflax.nn.initializers.delta_orthogonal`."""

    scale: float = 1.0
    column_axis: int = -1
    dtype: Dtype | None = None
    jax_name = "delta_orthogonal"


@dataclasses.dataclass(frozen=True, eq=False)
class Constant(_Recipe):
    """See `shardflax.nn.initializers.constant`."""

    value: Any
    dtype: Dtype | None = None
    jax_name = "constant"

    def _key(self) -> tuple[Any, ...]:
        """Numbers compare by type and value (1 is not 1.0 here), arrays by identity."""
        by_value = isinstance(self.value, int | float | complex | np.generic)
        value = self.value if by_value else id(self.value)
        return type(self.value), value, self.dtype

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __call__(
        self, key: Any, shape: Sequence[int], dtype: Dtype | None = None, out_sharding: Any = None
    ) -> Array:
        """Not through the cache, which would hold on to large arrays and to tracers."""
        layout = {} if out_sharding is None else {"out_sharding": out_sharding}
        args = () if dtype is None else (dtype,)
        return _factory(self)(key, tuple(shape), *args, **layout)
