"""Initializers on explicit axes: computed shard by shard there too.

On an explicit mesh an initializer's random numbers would be *typed* replicated, and so be made
whole on every device.  It runs with those axes auto instead, and its value is typed by its names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from shardflax.core.boxes import is_box
from shardflax.partitioning.linen_rules import linen_axes
from shardflax.partitioning.resolve import resolve
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.scope import AnyMesh, axis_kinds, free_axes, mesh_in_scope
from shardflax.partitioning.spec_check import canonical_spec, check_spec, make_spec, spec_axes
from shardflax.partitioning.untyped import jx

__all__ = ["call_initializer"]


def call_initializer(
    fn: Callable[..., Any],
    names: tuple[Any, ...],
    rules: LogicalRules | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`fn(*args, **kwargs)`; where a mesh with explicit axes is in scope, shard by shard.

    `rules` None says that `names` are mesh axes.  What cannot be laid out so is called plainly:
    others check and refuse it.

    >>> call_initializer(jax.nn.initializers.ones, ("embed",), (), (None, (3,)), {}).shape
    (3,)
    """
    mesh = mesh_in_scope()
    explicit = () if mesh is None else _explicit(mesh)
    if mesh is None or not explicit:
        return fn(*args, **kwargs)
    leaves, structure = jx.tree.flatten((args, kwargs))
    traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def call(*arrays: Any) -> Any:
        filled = list(leaves)
        for i, array in zip(traced, arrays, strict=True):
            filled[i] = array
        positional, named = jx.tree.unflatten(structure, filled)
        return fn(*positional, **named)

    arrays = [leaves[i] for i in traced]
    spec = _spec(jx.eval_shape(call, *arrays), names, rules, mesh, explicit)
    if spec is None:
        return fn(*args, **kwargs)
    return jx.sharding.auto_axes(call, axes=explicit, out_sharding=spec)(*arrays)


def _explicit(mesh: AnyMesh) -> tuple[str, ...]:
    """The explicit axes of `mesh`."""
    return tuple(name for name, kind in axis_kinds(mesh) if kind == AxisType.Explicit)


def _spec(
    value: Any,
    names: tuple[Any, ...],
    rules: LogicalRules | None,
    mesh: AnyMesh,
    explicit: tuple[str, ...],
) -> PartitionSpec | None:
    """The explicit part of the value's spec, one entry a dim; None where there is none."""
    if is_box(value) or not hasattr(value, "shape") or len(value.shape) != len(names):
        return None
    shape, axes = tuple(np.shape(value)), free_axes(mesh)
    if isinstance(rules, AxisRules):
        found = resolve(names, rules, shape, axes, rules.min_size)
        spec, wrong = found.spec, bool(found.problems)
    else:
        entries = names if rules is None else linen_axes(names, rules)[0]
        spec = PartitionSpec(*entries)
        wrong = bool(check_spec(shape, spec, dict(axes), "names"))
        spec = canonical_spec(spec, dict(axes))
    if wrong or PartitionSpec.UNCONSTRAINED in tuple(spec):
        return None
    kept = make_spec(tuple(a for a in spec_axes(part) if a in explicit) for part in spec)
    return PartitionSpec(*kept, *[None] * (len(shape) - len(kept)))
