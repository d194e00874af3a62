"""Arrays that meet on explicit axes: JAX joins no two layouts of one dim."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from shardflax.partitioning.untyped import jx

__all__ = ["laid_out_like", "repeated_like"]


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


def repeated_like(x: Any, other: Any, dim: int) -> Any:
    """`x` with each entry of `dim` repeated to the size, and laid out as, `dim` of `other`.

    Only where axes are explicit and `dim` lies otherwise in the two, `x` being returned as it is
    elsewhere: JAX splits no dim whose parts are not those of the groups that it is split into.

    >>> from shardflax.partitioning import make_mesh, use, AxisRules, constrain
    >>> with use(make_mesh("tensor=8:explicit"), AxisRules({"heads": "tensor"})):
    ...     query = constrain(jax.numpy.ones((2, 8, 4)), (None, "heads", None))
    ...     jax.typeof(repeated_like(jax.numpy.ones((2, 2, 4)), query, -2))
    ShapedArray(float32[2,8@tensor,4])
    """
    mine, theirs = jx.typeof(x).sharding, jx.typeof(other).sharding
    if AxisType.Explicit not in theirs.mesh.axis_types or mine.spec[dim] == theirs.spec[dim]:
        return x
    spec = list(mine.spec)
    spec[dim] = None
    whole = jx.sharding.reshard(x, NamedSharding(theirs.mesh, PartitionSpec(*spec)))
    spec[dim] = theirs.spec[dim]
    times = other.shape[dim] // x.shape[dim]
    many = jx.numpy.repeat(whole, times, axis=dim)
    return jx.sharding.reshard(many, NamedSharding(theirs.mesh, PartitionSpec(*spec)))
