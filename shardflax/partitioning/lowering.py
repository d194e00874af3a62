"""The one place where specs are lowered onto arrays.

On auto axes a constraint is `with_sharding_constraint`, on explicit axes `reshard`, on manual
axes (inside `jax.shard_map`) nothing; a mesh may mix them.  It follows the mesh that is given or
in scope, never the default backend.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from shardflax.core.staging import is_tracing
from shardflax.partitioning.call_site import here
from shardflax.partitioning.errors import mapped_over, no_devices
from shardflax.partitioning.scope import AnyMesh, axis_kinds, devices_of
from shardflax.partitioning.spec_check import make_spec, spec_axes
from shardflax.partitioning.untyped import jx

__all__ = ["lower"]


def lower(x: Any, spec: PartitionSpec, mesh: AnyMesh, what: str = "a layout") -> Any:
    """Puts `spec` on `x`, each axis of the mesh in the way of its type.

    `what` says whose spec it is, where JAX refuses it: `MeshScopeError` for a concrete array over
    a mesh without devices, `AxisConflictError` for an axis over which a `vmap` around maps.

    >>> from shardflax.partitioning import make_mesh
    >>> x = np.ones((8, 2), "float32")
    >>> lower(x, PartitionSpec("data"), make_mesh("data=8")).sharding.spec
    P('data',)
    """
    if mesh.size == 1:
        return x
    traced = isinstance(x, jx.core.Tracer)
    explicit, auto = _by_type(spec, axis_kinds(mesh))
    mesh = devices_of(mesh, traced)
    if not traced and isinstance(mesh, AbstractMesh) and not is_tracing():
        raise no_devices(what + here(), spec, mesh.shape)
    try:
        if explicit is not None and auto is not None and not traced:
            return jx.jit(_lower, static_argnums=(1, 2, 3))(x, explicit, auto, mesh)
        return _lower(x, explicit, auto, mesh)
    except Exception as error:  # JAX's class for duplicates is an Exception and no more
        if "spmd_axis_name" in str(error) or "has duplicate entries" in str(error):
            raise mapped_over(what + here(), spec) from error
        raise


def _lower(
    x: Any, explicit: PartitionSpec | None, auto: PartitionSpec | None, mesh: AnyMesh
) -> Any:
    """Explicit axes first, then auto ones; an eager array would lose the first unless jitted."""
    if explicit is not None:
        whole = _settle(_pad(explicit, np.ndim(x)), x)
        x = jx.sharding.reshard(x, NamedSharding(mesh, whole))
    if auto is not None:
        x = jx.lax.with_sharding_constraint(x, NamedSharding(mesh, auto))
    return x


@functools.lru_cache(maxsize=4096)
def _by_type(
    spec: PartitionSpec, kinds: tuple[tuple[str, AxisType], ...]
) -> tuple[PartitionSpec | None, PartitionSpec | None]:
    """`spec` with the explicit axes alone and with the auto ones; None if the mesh has none."""
    types = dict(kinds)

    def kept(entry: Any, kind: AxisType) -> Any:
        if entry is PartitionSpec.UNCONSTRAINED:
            return entry
        return tuple(axis for axis in spec_axes(entry) if types[axis] == kind)

    def only(kind: AxisType) -> PartitionSpec | None:
        return make_spec(kept(entry, kind) for entry in spec) if kind in types.values() else None

    return only(AxisType.Explicit), only(AxisType.Auto)


def _settle(spec: PartitionSpec, x: Any) -> PartitionSpec:
    """`spec` with each unconstrained dim as `x` has it: `reshard` wants every dim said."""
    if PartitionSpec.UNCONSTRAINED not in tuple(spec):
        return spec
    now = _pad(jax.typeof(x).sharding.spec, len(spec))
    return PartitionSpec(
        *(
            old if new is PartitionSpec.UNCONSTRAINED else new
            for new, old in zip(spec, now, strict=True)
        )
    )


def _pad(spec: PartitionSpec, rank: int) -> PartitionSpec:
    return PartitionSpec(*spec, *[None] * (rank - len(spec)))
