"""Normalization of a layer's weights instead of its activations: `SpectralNorm`, `WeightNorm`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from shardflax import partitioning
from shardflax.core import Module, compact, map_variables, nowrap
from shardflax.core.boxes import is_box, unbox
from shardflax.nn import dtypes, initializers
from shardflax.nn._norms import squared
from shardflax.nn.errors import InputRankError, where
from shardflax.nn.general import canonical_dims
from shardflax.nn.policy import LayerBase
from shardflax.nn.types import Array, Axes, Dtype, Initializer, Names
from shardflax.partitioning import LogicallyPartitioned, default_names
from shardflax.partitioning.explicit_out import InAuto, explicit_axes

__all__ = ["SpectralNorm", "WeightNorm"]


def _with_params(layer: Module, fn: Any, init: bool, keep: bool = False) -> Any:
    """`layer` as a function, with each of its parameters as `fn(path, value, names)` gives it.

    The names are those of the parameter's box, if it has one.  At `init` the parameters stay so;
    with `keep` also in an `apply` that may change them.
    """

    def one(path: Any, leaf: Any) -> Any:
        # The first key is the collection's.
        keys = (str(getattr(key, "key", key)) for key in path[1:])
        known = leaf.names if isinstance(leaf, LogicallyPartitioned) else None
        value = fn("/".join((str(layer.name), *keys)), unbox(leaf), known)
        return leaf.replace_boxed(value) if is_box(leaf) else value

    def mapped(collections: Any) -> Any:
        return jax.tree.map_with_path(one, collections, is_leaf=is_box)

    return partial(map_variables(_call, "params", mapped, init=init, mutable=keep), layer)


def _call(layer: Any, *args: Any, **kwargs: Any) -> Any:
    return layer(*args, **kwargs)


def _unit(x: Array, epsilon: float, dims: tuple[int, ...] | None = None) -> Array:
    """`x` divided by its Euclidean norm over `dims`."""
    # Not `lax.square`, whose derivative rounds otherwise than Linen's product does.
    squares = squared(x) if jnp.iscomplexobj(x) else x * x
    return x * lax.rsqrt(jnp.sum(squares, axis=dims, keepdims=True) + epsilon)


@dataclass(frozen=True)
class _PowerIteration:
    """From weights and a guess `u`: the weights over the largest singular value, that, and `u`."""

    steps: int
    epsilon: float

    def __call__(self, weights: Array, u: Array) -> tuple[Array, Array, Array]:
        matrix = jnp.reshape(weights, (-1, weights.shape[-1]))
        v = jnp.zeros((1, matrix.shape[0]), u.dtype)
        for _ in range(self.steps):
            v = _unit(jnp.matmul(u, jnp.conj(matrix.T)), self.epsilon)
            u = _unit(jnp.matmul(v, matrix), self.epsilon)
        u, v = lax.stop_gradient(u), lax.stop_gradient(v)
        sigma = jnp.matmul(jnp.matmul(v, matrix), jnp.conj(u.T))[0, 0]
        y = matrix / jnp.where(sigma != 0, sigma, 1)
        return jnp.reshape(y, weights.shape), sigma, u


class SpectralNorm(LayerBase):
    """Calls a layer with each of its matrices divided by its largest singular value.

    That value is estimated by `n_steps` power iterations a call (arXiv:1802.05957), from a vector
    `<path>/u` that is kept, with the estimate `<path>/sigma`, in the collection `batch_stats` (or
    `collection_name`); without a step nothing is divided or kept.  With `update_stats` they are
    stored anew, which needs that collection mutable.  Parameters of one dim and scalars stay as
    they are; of more than two dims, all but the last are merged, or, with `error_on_non_matrix`,
    they are an `InputRankError`.  `stats_axes` names the dims of `u`, `(1, features)`; by default
    the last has the parameter's name.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> dense = nn.Dense(2, use_bias=False, kernel_init=nn.initializers.ones)
    >>> layer, x = nn.SpectralNorm(dense), jnp.eye(3)
    >>> variables = layer.init(jax.random.key(0), x, update_stats=False)
    >>> matrix = layer.apply(variables, x, update_stats=False)
    >>> [round(v, 3) for v in matrix[0].tolist()]  # of rank one: divided by the root of 3 * 2
    [0.408, 0.408]
    """

    layer_instance: Module
    n_steps: int = 1
    epsilon: float = 1e-12
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    error_on_non_matrix: bool = False
    collection_name: str = "batch_stats"
    stats_axes: Names | None = field(default=None, kw_only=True)

    @compact
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
        fn = partial(self._normalized, update=update_stats)
        init = self.is_initializing()
        return _with_params(self.layer_instance, fn, init, keep=True)(*args, **kwargs)

    @nowrap
    def _normalized(self, name: str, value: Array, known: Names | None, update: bool) -> Array:
        if value.ndim < 2 or self.n_steps < 1:
            return value
        if value.ndim > 2 and self.error_on_non_matrix:
            raise InputRankError(
                where(self), f"parameters {name!r}", "a matrix (error_on_non_matrix)", value.shape
            )
        u, sigma = self._statistics(name, value.shape[-1], known and known[-1])
        iterate: Any = _PowerIteration(self.n_steps, self.epsilon)
        if explicit_axes():
            of_value, of_u = (jax.typeof(x).sharding.spec for x in (value, u.value))
            specs: Any = (of_value, PartitionSpec(), of_u)
            iterate = InAuto(iterate, specs)
        y, new_sigma, new_u = iterate(value, u.value)
        if update:
            u.value, sigma.value = new_u, new_sigma
        dtype = dtypes.canonicalize_dtype(value, new_u, new_sigma, dtype=self.dtype)
        return dtypes.cast(y, dtype)

    @nowrap
    def _statistics(self, name: str, size: int, known: Any) -> tuple[Any, Any]:
        """The variables `u` and `sigma` of a parameter; `known` is the name of its last dim."""
        col, shape = self.collection_name, (1, size)
        key = None if self.has_variable(col, f"{name}/u") else self.make_rng("params")
        axes = default_names(None, known) if self.stats_axes is None else self.stats_axes
        init = partitioning.named(initializers.normal(1.0), axes)
        u = self.variable(col, f"{name}/u", init, key, shape, self.param_dtype)
        return u, self.variable(col, f"{name}/sigma", jnp.ones, (), self.param_dtype)


class WeightNorm(LayerBase):
    """Calls a layer with each of its kernels at norm 1, times a learned scale (arXiv:1602.07868).

    The norm is that over all dims but `feature_axes` (`None`: over all dims); the parameter
    `<path>/scale`, left out with `use_scale=False`, has the sizes of those.  `variable_filter` are
    parts of names: parameters whose path has one of them are normalized, with `None` all are.
    `scale_axes` are by default the parameter's names.  Dims that do not exist are an `AxesError`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer = nn.WeightNorm(nn.Dense(2, use_bias=False))
    >>> kernel, variables = layer.init_with_output(jax.random.key(0), jnp.eye(3))
    >>> [round(v, 3) for v in jnp.linalg.norm(kernel, axis=0).tolist()]
    [1.0, 1.0]
    """

    layer_instance: Module
    epsilon: float = 1e-12
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = initializers.ones
    feature_axes: Axes | None = -1
    variable_filter: Iterable[str] | None = field(default_factory=lambda: {"kernel"})
    scale_axes: Names | None = field(default=None, kw_only=True)

    @compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _with_params(self.layer_instance, self._normalized, self.is_initializing())
        return call(*args, **kwargs)

    @nowrap
    def _normalized(self, name: str, value: Array, known: Names | None) -> Array:
        if self.variable_filter is not None and not any(f in name for f in self.variable_filter):
            return value
        dims = () if self.feature_axes is None else self.feature_axes
        features = canonical_dims(where(self), "feature_axes", dims, value.shape)
        others = tuple(d for d in range(value.ndim) if d not in features)
        y = _unit(value, self.epsilon, others)
        scale = None
        if self.use_scale:
            shape = tuple(value.shape[d] for d in features)
            same = [known and known[d] for d in features]
            axes = default_names(*same) if self.scale_axes is None else self.scale_axes
            init = partitioning.named(self.scale_init, axes)
            scale = self.param(f"{name}/scale", init, shape, self.param_dtype)
            y = y * jnp.expand_dims(scale, others)
        return dtypes.cast(y, dtypes.canonicalize_dtype(value, scale, dtype=self.dtype))
