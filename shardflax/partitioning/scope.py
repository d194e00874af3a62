"""Which rules and which mesh are in scope: the one thread-local of partitioning."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from shardflax.core.staging import entered_mesh
from shardflax.partitioning.errors import InvalidRuleError, Problem, raise_problems
from shardflax.partitioning.given import check_mesh, check_rules
from shardflax.partitioning.resolve import MeshAxes, check_mesh_axes
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.untyped import jx

__all__ = [
    "AnyMesh",
    "InitTrace",
    "axis_kinds",
    "devices_of",
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
    """What an abstract init met: the names its constraints used, and what was wrong with them.

    `calls` are the paths of modules and methods, if the rules have names for some by path.
    """

    names: set[str] = field(default_factory=lambda: set[str]())
    calls: set[str] = field(default_factory=lambda: set[str]())
    problems: list[Problem] = field(default_factory=lambda: list[Problem]())


class _Scope(threading.local):
    """Rules (None: nobody said any), and what goes with them.

    `mesh` is one that `use` could enter only abstractly, being called inside a trace; `init` is
    the record of the init that is being traced.
    """

    rules: LogicalRules | None = None
    mesh: Mesh | None = None
    init: InitTrace | None = None


_scope = _Scope()

# JAX looks traces up by this too: a function jitted once is traced anew under other rules.
_traced_under: Any = jx.make_user_context(None)


def _as_key(rules: LogicalRules | None) -> Any:
    """The rules as something that can be compared and hashed."""
    if rules is None or isinstance(rules, AxisRules):
        return rules
    return tuple(
        (name, axes if isinstance(axes, str) else tuple(axes or ())) for name, axes in rules
    )


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
    """Sets the rules of this thread until they are set again; `()` takes them away.

    Prefer `logical_axis_rules` or `use`, which put the old ones back.

    >>> set_logical_axis_rules([("embed", "model")])
    >>> get_logical_axis_rules()
    [('embed', 'model')]
    >>> set_logical_axis_rules(())
    """
    check_rules(rules)
    _scope.rules = rules if rules or isinstance(rules, AxisRules) else None
    _traced_under.set_global(_as_key(_scope.rules))
    if _has_outputs(rules):
        from shardflax.partitioning.override_outputs import install  # it needs this module

        install(rules)


@contextmanager
def logical_axis_rules(rules: LogicalRules) -> Generator[None]:
    """Puts `rules` in scope: pairs (Linen's contract) or `AxisRules` (strict).

    >>> with logical_axis_rules([("batch", "data")]):
    ...     get_logical_axis_rules()
    [('batch', 'data')]
    """
    check_rules(rules, or_none=True)
    before, _scope.rules = _scope.rules, rules
    try:
        with _traced_under(_as_key(rules)), _outputs_laid_out(rules):
            yield
    finally:
        _scope.rules = before


def _has_outputs(rules: LogicalRules) -> bool:
    """True for rules that name what methods return."""
    return isinstance(rules, AxisRules) and bool(rules.activation_overrides)


def _outputs_laid_out(rules: LogicalRules) -> contextlib.AbstractContextManager[None]:
    """A context in which what methods return is laid out, if the rules name any."""
    if not _has_outputs(rules):
        return contextlib.nullcontext()
    from shardflax.partitioning.override_outputs import installed  # it needs this module

    return installed(rules)


@contextmanager
def use(
    mesh: AnyMesh | None, rules: LogicalRules, which: Literal["compute", "eval"] = "compute"
) -> Generator[None]:
    """Puts a mesh and rules in scope: constraints inside follow that mesh.

    The mesh is JAX's (`jax.set_mesh`; inside `jax.jit`, `jax.sharding.use_abstract_mesh`).  With
    strict rules the two are checked against each other.  `mesh` None sets the rules alone.

    Activations, and weights at their use, follow the set `which` of strict rules; parameters lie
    as they are stored in either case.

    Raises `UnknownAxisError` for an axis that a rule names and the mesh lacks, or a mesh axis
    that looks like a slip; `InvalidRuleError` for another set, or for "eval" of plain pairs.

    >>> from shardflax.partitioning import make_mesh, preset
    >>> with use(make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")):
    ...     jax.sharding.get_abstract_mesh().axis_names
    ('fsdp', 'tensor')
    """
    rules = _for(rules, which)
    if mesh is not None:
        check_mesh(mesh)
    if mesh is not None and isinstance(rules, AxisRules):
        raise_problems(check_mesh_axes(rules, dict(mesh.shape)))
    with logical_axis_rules(rules), _enter(mesh):
        yield


def _for(rules: LogicalRules, which: str) -> LogicalRules:
    """The rules, with those for evaluation in the place of those for compute, if asked for."""
    if which == "compute":
        return rules
    if which != "eval" or not isinstance(rules, AxisRules):
        raise InvalidRuleError(
            f"use(..., which={which!r}): expected 'compute', or, with AxisRules, 'eval'. Layouts "
            f"of parameters and of the optimizer's state are those of the Layout."
        )
    return rules.with_sets(compute=rules.eval)


@contextmanager
def _enter(mesh: AnyMesh | None) -> Generator[None]:
    """Puts `mesh` in JAX's scope, if it is not there already."""
    before = _scope.mesh
    if isinstance(mesh, Mesh) and not _inside_jit():
        _scope.mesh, manager = None, jax.set_mesh(mesh)
    elif mesh is None or _same_axes(jax.sharding.get_abstract_mesh(), mesh):
        manager = contextlib.nullcontext()  # in a `shard_map`, the one in scope knows more
    elif isinstance(mesh, Mesh):
        _scope.mesh, manager = mesh, jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    else:
        _scope.mesh, manager = None, jax.sharding.use_abstract_mesh(mesh)
    try:
        with manager:
            yield
    finally:
        _scope.mesh = before


def _inside_jit() -> bool:
    """True where JAX refuses to set a mesh or to tell the concrete one."""
    try:
        jax.sharding.get_mesh()
    except ValueError:
        return True
    return False


def devices_of(mesh: AnyMesh, traced: bool) -> AnyMesh:
    """The mesh in scope with its devices, if they are known; `mesh` itself otherwise.

    Constraints on concrete arrays need the devices, and so do those under a `use` inside
    `jax.jit`.
    """
    if isinstance(mesh, Mesh):
        return mesh
    known = _scope.mesh
    if known is None and not traced and not _inside_jit():
        known = jax.sharding.get_mesh()
    return known if known is not None and known.abstract_mesh == mesh else mesh


def _same_axes(a: AnyMesh, b: AnyMesh) -> bool:
    return a.axis_names == b.axis_names and a.axis_sizes == b.axis_sizes


def mesh_in_scope(mesh: AnyMesh | None = None, x: Any = None) -> AnyMesh | None:
    """The mesh that a constraint follows: `mesh`, or else the one in scope, or None.

    A mesh entered by `with mesh:` is in scope too.  Where there is none, an array `x` that is
    typed on explicit axes has one.  Inside `jax.shard_map` the mesh in scope stands for `mesh`,
    if their axes are the same: it knows which of them are manual.
    """
    context = jax.sharding.get_abstract_mesh()
    if mesh is not None:
        check_mesh(mesh)
        return context if _same_axes(context, mesh) and not _says_as_much(mesh, context) else mesh
    if not context.empty:
        return context
    return entered_mesh() or _explicit_mesh(x)


def _says_as_much(mesh: AnyMesh, context: AbstractMesh) -> bool:
    """True where the mesh in scope knows nothing that `mesh`, of equal axes, does not."""
    kinds = axis_kinds(context)
    return kinds == axis_kinds(mesh) and AxisType.Manual not in dict(kinds).values()


def _explicit_mesh(x: Any) -> AbstractMesh | None:
    """The mesh with explicit axes on which an array is typed, or None."""
    if not isinstance(x, jax.Array):
        return None
    mesh = jx.typeof(x).sharding.mesh
    return mesh if not mesh.empty and AxisType.Explicit in mesh.axis_types else None


@functools.lru_cache(maxsize=256)
def axis_kinds(mesh: AnyMesh) -> tuple[tuple[str, AxisType], ...]:
    """The (axis, type) pairs of a mesh.

    >>> from shardflax.partitioning import make_mesh
    >>> axis_kinds(make_mesh("data=8"))
    (('data', Auto),)
    """
    kinds = mesh.axis_types or (AxisType.Auto,) * len(mesh.axis_names)
    return tuple(zip(mesh.axis_names, kinds, strict=True))


@functools.lru_cache(maxsize=256)
def free_axes(mesh: AnyMesh) -> MeshAxes:
    """The (axis, size) pairs that can shard an array; a manual axis counts as size 1.

    >>> from shardflax.partitioning import make_mesh
    >>> free_axes(make_mesh("fsdp=4,tensor=2"))
    (('fsdp', 4), ('tensor', 2))
    """
    return tuple(
        (name, 1 if kind == AxisType.Manual else size)
        for (name, kind), size in zip(axis_kinds(mesh), mesh.axis_sizes, strict=True)
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
