"""Normalization over the batch: `BatchNorm`, with running statistics for evaluation."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import jax.numpy as jnp

from shardflax import partitioning
from shardflax.core import compact, nowrap
from shardflax.nn import _windows as windows
from shardflax.nn import initializers
from shardflax.nn._norms import Norm, for_rank
from shardflax.nn.errors import InputRankError, InputShapeError, where
from shardflax.nn.stochastic import merge_param
from shardflax.nn.types import Array, Axes, Dtype, Initializer, Names
from shardflax.partitioning import default_names

__all__ = ["BatchNorm"]


class BatchNorm(Norm):
    """Normalizes each feature to mean 0 and variance 1 over the batch (arXiv:1502.03167).

    The features are the dims `axis`; statistics are taken over all others, over the elements
    where `mask` is true, in at least float32 (unless `force_float32_reductions=False`).  The output
    has the input's shape, in `dtype`, by default what input and parameters promote to.
    Parameters `scale` and `bias`, and `mean` and `var` in the collection `batch_stats`, have the
    sizes of `axis`.

    With `use_running_average` (of the layer or of the call, exactly one of them) the stored
    statistics are used.  Otherwise those of the batch are, and the stored ones become
    `momentum * stored + (1 - momentum) * batch`: `apply` needs `mutable=["batch_stats"]`.

    The statistics are those of the whole array, however it is sharded.  Where the layer sees a
    part of the batch only, under `vmap`, `pmap` or `shard_map`, `axis_name` (and
    `axis_index_groups`) say over which axis to average; at `init` they are ignored.

    Dims that do not exist are an `AxesError`, a mask that does not broadcast a `MaskShapeError`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> layer = nn.BatchNorm(use_running_average=False, momentum=0.9)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 1)))
    >>> x = jnp.array([[1.0], [3.0]])
    >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    >>> [round(v, 2) for v in y[:, 0].tolist()], round(updates["batch_stats"]["mean"].item(), 2)
    ([-1.0, 1.0], 0.2)
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    scale_axes: Names = field(default=default_names("norm"), kw_only=True)
    bias_axes: Names = field(default=default_names("norm"), kw_only=True)
    stats_axes: Names = field(default=default_names("norm"), kw_only=True)
    out_axes: Names | None = field(default=windows.BATCH_FIRST, kw_only=True)

    @compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        stored = merge_param("use_running_average", self.use_running_average, use_running_average)
        x = jnp.asarray(x)
        features = self.dims("axis", self.axis, x)
        others = tuple(d for d in range(x.ndim) if d not in features)
        shape = tuple(x.shape[d] for d in features)
        old_mean = self._statistic("mean", initializers.zeros, shape)
        old_variance = self._statistic("var", initializers.ones, shape)
        self._check(x, features, old_mean.value, old_variance.value)
        if stored:
            mean, variance = old_mean.value, old_variance.value
        else:
            over = self.reduction(x, mask, others)
            if self.is_initializing():
                over = over._replace(axis_name=None)
            mean, variance = self.moments(x, over)
            if not self.is_initializing():
                self._update(old_mean, mean)
                self._update(old_variance, variance)
        scale, bias = self.scale_and_bias(x, features)
        mean, variance = (jnp.expand_dims(v, others) for v in (mean, variance))
        y = self.normalized(x, mean, variance, scale, bias)
        return windows.Said(self.out_axes).lay_out(y)

    @nowrap
    def _statistic(self, name: str, init: Initializer, shape: tuple[int, ...]) -> Any:
        init = partitioning.named(init, for_rank(self.stats_axes, len(shape)))
        return self.variable("batch_stats", name, init, None, shape, jnp.float32)

    @nowrap
    def _check(self, x: Array, features: tuple[int, ...], *stored: Array) -> None:
        """Raises unless the stored statistics are of so many features."""
        for value in stored:
            if jnp.shape(value) == tuple(x.shape[d] for d in features):
                continue
            why = f"the stored statistics have shape {jnp.shape(value)}"
            for dim, size in zip(features, jnp.shape(value), strict=False):
                if x.shape[dim] != size:
                    raise InputShapeError(
                        where(self), "inputs", dim=dim, expected=size, found=x.shape[dim], why=why
                    )
            raise InputRankError(where(self), "inputs", why, x.shape)

    @nowrap
    def _update(self, stored: Any, new: Array) -> None:
        stored.value = self.momentum * stored.value + (1 - self.momentum) * new
