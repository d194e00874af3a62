"""From a manifest and a target state to arrays on the target's devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from shardflax.ckpt.leaves import LeafSpec
from shardflax.ckpt.manifest import Manifest
from shardflax.ckpt.paths import Path, leaves_by_path, nest, show
from shardflax.core.boxes import rebox, unbox

__all__ = ["Plan", "plan"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How each saved leaf becomes the target leaf of the same path.

    `restore_args()` tells Orbax what to read, and where to; `assemble(arrays)` makes the state.
    """

    saved: Mapping[Path, LeafSpec]
    target: Any

    def restore_args(self) -> ocp.args.PyTreeRestore:
        """What to read: into the target's sharding where it has one, else to the host."""
        wanted = leaves_by_path(self.target)
        read = {
            path: _restore_arg(spec, wanted[path])
            for path, spec in self.saved.items()
            if spec.on_disk
        }
        return ocp.args.PyTreeRestore(
            item=nest(dict.fromkeys(read, 0)), restore_args=nest(dict(read))
        )

    def assemble(self, arrays: Any) -> Any:
        """The target's tree, boxes included, with the values that were read.

        Raises ValueError if an array is not what the manifest says.
        """
        read = leaves_by_path(arrays)
        wanted = leaves_by_path(self.target)
        leaves = [
            _place(path, self.saved[path], read.get(path), leaf) for path, leaf in wanted.items()
        ]
        values = jax.tree.unflatten(jax.tree.structure(unbox(self.target)), leaves)
        return rebox(self.target, values)


def plan(manifest: Manifest, target: Any) -> tuple[Plan, list[str]]:
    """The plan, and the differences that forbid it, one line each.

    >>> manifest = Manifest.of({"w": jnp.ones(2)})
    >>> plan(manifest, {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})[1]
    []
    """
    differences = manifest.differences(Manifest.of(target))
    differences += [
        line for path, leaf in leaves_by_path(target).items() if (line := _narrowed(path, leaf))
    ]
    return Plan(manifest.leaves, target), differences


def _narrowed(path: Path, leaf: Any) -> str | None:
    """A line if JAX could not make an array of this dtype at all."""
    if not isinstance(leaf, jax.ShapeDtypeStruct) or _is_key(leaf):
        return None
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if dtype == leaf.dtype:
        return None
    return (
        f"dtype    {show(path)}  target {leaf.dtype} would become {dtype}: "
        f"set jax_enable_x64, or give a numpy array as the target"
    )


def _is_key(leaf: Any) -> bool:
    """True for an array of typed PRNG keys, abstract or not."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where a leaf is committed to; None for host values and for arrays that JAX may move."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding
    if isinstance(leaf, jax.Array) and leaf.committed:
        return leaf.sharding
    return None


def _restore_arg(saved: LeafSpec, leaf: Any) -> ocp.RestoreArgs:
    """How Orbax reads one leaf; the dtype is never given, so that nothing is cast."""
    sharding = _sharding(leaf)
    if sharding is None or saved.kind == "python":
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding)


def _place(path: Path, saved: LeafSpec, value: Any, target: Any) -> Any:
    """One leaf in the target's own type, on its devices."""
    value = _checked(path, saved, _value(saved, value, target))
    if not isinstance(target, jax.Array | jax.ShapeDtypeStruct):
        return _on_host(value, target)
    if saved.kind == "key":
        return jax.random.wrap_key_data(_on_device(value, target), impl=saved.impl)
    return _weak(_on_device(value, target), target)


def _value(saved: LeafSpec, read: Any, target: Any) -> Any:
    """What was read, or made from the manifest where that has it all."""
    if saved.kind == "python":
        return np.asarray(saved.value, dtype=getattr(target, "dtype", object))
    if saved.on_disk:
        return read
    if saved.kind == "key":
        words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=saved.impl)))
        return np.zeros((*saved.shape, *words.shape), words.dtype)
    return np.zeros(saved.shape, jnp.dtype(saved.dtype))


def _checked(path: Path, saved: LeafSpec, value: Any) -> Any:
    """`value`, if the stored array is the one that the manifest promised."""
    if value is None:
        raise ValueError(f"leaf {show(path)!r} is in the manifest but not among the arrays")
    if saved.kind == "array" and (value.shape, value.dtype.name) != (saved.shape, saved.dtype):
        found = LeafSpec("array", value.shape, value.dtype.name)
        raise ValueError(f"leaf {show(path)!r} is {found}, the manifest says {saved}")
    return value


def _on_host(value: Any, target: Any) -> Any:
    """A numpy array, numpy scalar or Python scalar, as the target is."""
    if isinstance(target, np.ndarray):
        return np.asarray(value)
    if isinstance(target, np.generic):
        return np.asarray(value)[()]
    return type(target)(value.item())


def _on_device(value: Any, target: Any) -> jax.Array:
    """A JAX array, committed to the target's sharding if it has one."""
    if isinstance(value, jax.Array):
        return value
    sharding = _sharding(target)
    if sharding is None:
        return jnp.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _weak(value: jax.Array, target: Any) -> jax.Array:
    """`value` with the weak type of a scalar target, so that a compiled step takes it as it is."""
    if value.shape or not getattr(target, "weak_type", False):
        return value
    scalar = np.asarray(value.addressable_data(0)).item()
    return jax.jit(lambda x: x, out_shardings=_sharding(target))(scalar)
