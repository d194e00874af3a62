"""Arrays that meet on explicit axes: JAX joins no two layouts of one dim."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from shardflax.partitioning.untyped import jx

__all__ = ["laid_out_like"]


def laid_out_like(x: Any, other: Any) -> Any:
    """`x` with its dims laid out as the first dims of `other` are, where axes are explicit.

    On auto and manual axes, and with no mesh, `x` is returned as it is.

    >>> from shardflax.partitioning import make_mesh, use, AxisRules, constrain
    >>> mesh = make_mesh("fsdp=8:explicit")
    >>> with use(mesh, AxisRules({"batch": "fsdp"})):
    ...     logits = constrain(jax.numpy.ones((8, 4)), ("batch", None))
    ...     jax.typeof(laid_out_like(jax.numpy.ones(8), logits)).sharding.spec
    P('fsdp',)
    """
    if not isinstance(other, jax.Array):
        return x
    sharding = jx.typeof(other).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    spec = PartitionSpec(*sharding.spec[: np.ndim(x)])
    return jx.sharding.reshard(x, NamedSharding(sharding.mesh, spec))
