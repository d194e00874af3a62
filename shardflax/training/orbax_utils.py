"""Arguments for Orbax's checkpointers, made from trees of arrays."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding

__all__ = [
    "is_multi_device_array",
    "restore_args_from_target",
    "save_args_from_target",
]


def is_multi_device_array(value: Any) -> bool:
    """True for a `jax.Array` that lies on several devices.

    >>> is_multi_device_array(np.ones(3)), is_multi_device_array(jax.numpy.ones(3))
    (False, False)
    """
    return isinstance(value, jax.Array) and len(value.sharding.device_set) > 1


def save_args_from_target(target: Any) -> Any:
    """A tree like `target` with Orbax's default arguments for saving each leaf.

    >>> save_args_from_target({"w": np.ones(3)})["w"].dtype is None
    True
    """
    return jax.tree.map(lambda _: ocp.SaveArgs(), target)


def restore_args_from_target(target: Any, mesh: Mesh | None = None) -> Any:
    """A tree like `target` that has Orbax restore each leaf as what it is there.

    A `jax.Array`, or a `jax.ShapeDtypeStruct`, comes back in its sharding and dtype, a numpy array
    as one, a Python number as one.  `mesh` replaces the mesh of named shardings.

    >>> args = restore_args_from_target({"w": np.ones(3), "step": 1})
    >>> args["w"].restore_type.__name__, args["step"].restore_type.__name__
    ('ndarray', 'int')
    """
    return jax.tree.map(lambda leaf: _restore_args(leaf, mesh), target)


def _restore_args(leaf: Any, mesh: Mesh | None) -> Any:
    """How one leaf is restored."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None:
        if mesh is not None and isinstance(sharding, NamedSharding):
            sharding = NamedSharding(mesh, sharding.spec)
        shape = tuple(leaf.shape)
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=leaf.dtype)
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.RestoreArgs(restore_type=type(leaf))
