"""Which rules and which mesh are in scope: the one thread-local of partitioning."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from shardflax.partitioning.errors import Problem, raise_problems
from shardflax.partitioning.resolve import MeshAxes, check_mesh_axes
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.untyped import jx

__all__ = [
    "AnyMesh",
    "InitTrace",
    "free_axes",
    "get_logical_axis_rules",
    "init_trace",
    "init_tracing",
    "logical_axis_rules",
    "mesh_in_scope",
    "rules_in_scope",
    "set_logical_axis_rules",
    "use",
]

AnyMesh = Mesh | AbstractMesh


@dataclass
class InitTrace:
    """What an abstract init met: the names its constraints used, and what was wrong with them."""

    names: set[str] = field(default_factory=lambda: set[str]())
    problems: list[Problem] = field(default_factory=lambda: list[Problem]())


class _Scope(threading.local):
    """Rules (None: nobody said any), and the record of the init that is being traced, if any."""

    rules: LogicalRules | None = None
    init: InitTrace | None = None


_scope = _Scope()


def rules_in_scope() -> LogicalRules | None:
    """The rules in scope, or None where nobody set any."""
    return _scope.rules


def get_logical_axis_rules() -> LogicalRules:
    """The rules in scope; empty where there are none.

    >>> get_logical_axis_rules()
    ()
    """
    return () if _scope.rules is None else _scope.rules


def set_logical_axis_rules(rules: LogicalRules) -> None:
    """Sets the rules of this thread until they are set again.

    Prefer `logical_axis_rules` or `use`, which put the old ones back.

    >>> set_logical_axis_rules([("embed", "model")])
    >>> get_logical_axis_rules()
    [('embed', 'model')]
    >>> set_logical_axis_rules(())
    """
    _scope.rules = rules


@contextmanager
def logical_axis_rules(rules: LogicalRules) -> Generator[None]:
    """Puts `rules` in scope: pairs (Linen's contract) or `AxisRules` (strict).

    >>> with logical_axis_rules([("batch", "data")]):
    ...     get_logical_axis_rules()
    [('batch', 'data')]
    """
    before, _scope.rules = _scope.rules, rules
    try:
        yield
    finally:
        _scope.rules = before


@contextmanager
def use(mesh: AnyMesh | None, rules: LogicalRules) -> Generator[None]:
    """Puts a mesh and rules in scope: constraints inside follow that mesh.

    The mesh is JAX's (`jax.set_mesh`; inside `jax.jit`, `jax.sharding.use_abstract_mesh`).  With
    strict rules the two are checked against each other.  `mesh` None sets the rules alone.

    Raises `UnknownAxisError` for an axis that a rule names and the mesh lacks, or a mesh axis
    that looks like a slip.

    >>> from shardflax.partitioning import make_mesh, preset
    >>> with use(make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")):
    ...     jax.sharding.get_abstract_mesh().axis_names
    ('fsdp', 'tensor')
    """
    if mesh is not None and isinstance(rules, AxisRules):
        raise_problems(check_mesh_axes(rules, dict(mesh.shape)))
    with logical_axis_rules(rules), _enter(mesh):
        yield


def _enter(mesh: AnyMesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context manager that puts `mesh` in JAX's scope, if it is not there already."""
    if mesh is None:
        return contextlib.nullcontext()
    if isinstance(mesh, Mesh):
        try:
            return jax.set_mesh(mesh)
        except ValueError:  # refused inside a trace
            mesh = mesh.abstract_mesh
    if _same_axes(jax.sharding.get_abstract_mesh(), mesh):
        return contextlib.nullcontext()  # in a `shard_map`, the one in scope knows more
    return jax.sharding.use_abstract_mesh(mesh)


def _same_axes(a: AnyMesh, b: AnyMesh) -> bool:
    return a.axis_names == b.axis_names and a.axis_sizes == b.axis_sizes


def mesh_in_scope(mesh: AnyMesh | None = None) -> AnyMesh | None:
    """The mesh that a constraint follows: `mesh`, or else the one in scope, or None.

    Where `mesh` is the mesh in scope, the one in scope is returned: inside `jax.shard_map` it
    knows which axes are manual.  A mesh entered by `with mesh:` counts too.
    """
    context = jax.sharding.get_abstract_mesh()
    if mesh is not None:
        return context if _same_axes(context, mesh) else mesh
    return context if not context.empty else _legacy_mesh()


def _legacy_mesh() -> Mesh | None:
    """The mesh of a `with mesh:` block, which JAX shows to constraints by spec alone.

    Asks with a value that no trace can take up, so that asking leaves nothing in a program.
    """
    probe = jax.ShapeDtypeStruct((), np.dtype("float32"))
    try:
        jx.lax.with_sharding_constraint(probe, PartitionSpec())
    except RuntimeError:
        return None
    except TypeError:
        pass

    def constrained() -> Any:
        return jx.lax.with_sharding_constraint(0.0, PartitionSpec())

    return jx.make_jaxpr(constrained)().eqns[0].params["sharding"].mesh


def free_axes(mesh: AnyMesh) -> MeshAxes:
    """The (axis, size) pairs that can shard an array; a manual axis counts as size 1."""
    types = mesh.axis_types or (AxisType.Auto,) * len(mesh.axis_names)
    return tuple(
        (name, 1 if kind == AxisType.Manual else size)
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, types, strict=True)
    )


def init_trace() -> InitTrace | None:
    """The record of the init that is being traced on this thread, or None."""
    return _scope.init


@contextmanager
def init_tracing(trace: InitTrace) -> Generator[InitTrace]:
    """Marks an init: its activations are thrown away, so their constraints are only checked."""
    before, _scope.init = _scope.init, trace
    try:
        yield trace
    finally:
        _scope.init = before
