"""The layout of batches: what data loaders and `jax.jit` ask for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jax.sharding import Mesh, NamedSharding

from shardflax.partitioning.errors import raise_problems
from shardflax.partitioning.given import as_names, check_mesh, check_strict
from shardflax.partitioning.resolve import Resolution, check_mesh_axes, resolve
from shardflax.partitioning.rules import AxisRules
from shardflax.partitioning.scope import free_axes

__all__ = ["batch_axes", "batch_sharding"]


def batch_sharding(
    mesh: Mesh,
    rules: AxisRules,
    names: tuple[str | None, ...] = ("batch", "length"),
    shape: tuple[int, ...] | None = None,
) -> NamedSharding:
    """The sharding of a batch whose dims have `names`, under the rules for compute.

    For evaluation, give `rules.eval`.  With `shape`, the sizes are checked against the mesh.

    Raises a `LayoutError` for an unknown name, names of another rank than `shape`, or a dim that
    its axes do not divide; and, as `use` does, for rules that do not fit the mesh.

    >>> from shardflax.partitioning import make_mesh, preset
    >>> mesh = make_mesh("data=2,fsdp=2,tensor=2")
    >>> batch_sharding(mesh, preset("fsdp_tp"), shape=(8, 128)).spec
    P(('data', 'fsdp'),)
    """
    return NamedSharding(mesh, _resolved(mesh, rules, names, shape).spec)


def batch_axes(mesh: Mesh, rules: AxisRules, name: str = "batch") -> tuple[str, ...]:
    """The mesh axes (of size above 1) over which the dim `name` is spread.

    See `AxisRules.roles` for those of the context, of experts and of stages.

    >>> from shardflax.partitioning import make_mesh, preset
    >>> batch_axes(make_mesh("data=2,fsdp=2,tensor=2"), preset("fsdp_tp"))
    ('data', 'fsdp')
    """
    return _resolved(mesh, rules, (name,), None).dims[0].taken


def _resolved(
    mesh: Mesh, rules: AxisRules, names: tuple[Any, ...], shape: tuple[int, ...] | None
) -> Resolution:
    check_mesh(mesh)
    check_strict(rules)
    raise_problems(check_mesh_axes(rules, dict(mesh.shape)))
    sizes = None if shape is None else tuple(shape)
    found = resolve(as_names(names), rules.compute, sizes, free_axes(mesh))
    raise_problems([replace(p, where="batch") for p in found.problems])
    return found
