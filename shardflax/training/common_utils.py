"""Small helpers of training loops, mostly for arrays with a leading dim of one slice per device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from shardflax.jax_utils import unreplicate

__all__ = ["get_metrics", "onehot", "shard", "shard_prng_key", "stack_forest"]


def shard(xs: Any) -> Any:
    """Each array with its leading dim split into `(local devices, rest)`.

    >>> shard(jnp.ones((16, 3))).shape[0] == jax.local_device_count()
    True
    """
    count = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape((count, -1, *x.shape[1:])), xs)


def shard_prng_key(prng_key: jax.Array) -> jax.Array:
    """One key per local device.

    >>> shard_prng_key(jax.random.key(0)).shape == (jax.local_device_count(),)
    True
    """
    return jax.random.split(prng_key, jax.local_device_count())


def stack_forest(forest: Sequence[Any]) -> Any:
    """A sequence of trees of one structure as one tree of stacked arrays.

    >>> stack_forest([{"loss": 1.0}, {"loss": 2.0}])["loss"].tolist()
    [1.0, 2.0]
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *forest)


def get_metrics(device_metrics: Sequence[Any]) -> Any:
    """Metrics of several steps, replicated over the devices, as one tree of arrays over time.

    >>> from shardflax.jax_utils import replicate
    >>> get_metrics([replicate({"loss": 1.0}), replicate({"loss": 2.0})])["loss"].tolist()
    [1.0, 2.0]
    """
    return stack_forest(jax.device_get([unreplicate(metrics) for metrics in device_metrics]))


def onehot(
    labels: Any, num_classes: int, on_value: float = 1.0, off_value: float = 0.0
) -> jax.Array:
    """Integers as vectors (float32, a new last dim) with `on_value` at their index.

    >>> onehot(jnp.array([0, 2]), 3).tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    hot = labels[..., None] == jnp.arange(num_classes)
    return jnp.where(hot, on_value, off_value).astype(jnp.float32)
