"""Constraints by logical names: the one place where names are lowered onto arrays.

On auto axes a constraint is `with_sharding_constraint`, on explicit axes `reshard`, on manual
axes (inside `jax.shard_map`) nothing; a mesh may mix them.  It follows the mesh that is given or
in scope, never the default backend.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from shardflax.core.calls import current_module
from shardflax.core.staging import is_tracing
from shardflax.partitioning.defaults import DefaultNames, in_force
from shardflax.partitioning.errors import (
    LayoutError,
    NamesRankError,
    NoRulesWarning,
    Problem,
    kind_of,
    mapped_over,
    no_devices,
    raise_problems,
)
from shardflax.partitioning.linen_rules import RulesFallback, linen_axes, undecided_error
from shardflax.partitioning.names_tree import names_of_leaves
from shardflax.partitioning.paths import keys_of, path_text
from shardflax.partitioning.resolve import check_mesh_axes, resolve
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.scope import (
    AnyMesh,
    axis_kinds,
    devices_of,
    free_axes,
    init_trace,
    mesh_in_scope,
    rules_in_scope,
)
from shardflax.partitioning.spec_check import check_spec, make_spec, spec_axes
from shardflax.partitioning.untyped import jx

__all__ = [
    "constrain",
    "constrain_box",
    "constrain_spec",
    "located",
    "lower",
    "wanted_spec",
    "with_logical_constraint",
]

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_JAX = os.path.dirname(os.path.abspath(jax.__file__))
_warned: set[tuple[str, int]] = set()


def with_logical_constraint(
    x: Any,
    logical_axis_resources: Any,
    rules: LogicalRules | None = None,
    mesh: AnyMesh | None = None,
    fallback: RulesFallback = RulesFallback.AXIS_IS_UNSHARDED,
) -> Any:
    """Constrains the layout of `x`, an array or a tree of them, by logical names.

    `logical_axis_resources` is one tuple of names for every array of `x`, or a tree of such
    tuples; None constrains nothing.  `rules` and `mesh` default to those in scope.  Plain pairs
    follow Linen's contract (`fallback` says what an unknown name does); `AxisRules` are strict.
    With no rules at all the call does nothing, and warns once (`NoRulesWarning`).

    Raises a `LayoutError` for names of the wrong rank, also where no mesh is in scope; with a
    mesh, for an axis that it lacks or that does not divide its dim; `TreeMismatchError` for a tree
    of names that is none of `x`.

    >>> import jax.numpy as jnp
    >>> from shardflax.partitioning import make_mesh
    >>> mesh = make_mesh("data=4,model=2")
    >>> y = with_logical_constraint(
    ...     jnp.ones((8, 6)), ("batch", "mlp"), [("batch", "data"), ("mlp", "model")], mesh
    ... )
    >>> y.sharding.spec
    P('data', 'model')
    """
    if logical_axis_resources is None:
        return x
    if rules is None:
        rules = rules_in_scope()
    if rules is None:
        _warn_no_rules(logical_axis_resources)

    if not jx.tree_util.all_leaves([x]):
        return _constrain_tree(x, logical_axis_resources, rules, mesh, fallback)
    (names,) = names_of_leaves(logical_axis_resources, x)
    return _constrain(x, names, rules, mesh, fallback)


def _constrain_tree(
    tree: Any,
    names: Any,
    rules: LogicalRules | None,
    mesh: AnyMesh | None,
    fallback: RulesFallback,
) -> Any:
    """Constrains each leaf of a tree; errors say which."""
    flat, structure = jx.tree_util.tree_flatten_with_path(tree)
    done: list[Any] = []
    for (path, leaf), one in zip(flat, names_of_leaves(names, tree), strict=True):
        try:
            done.append(leaf if one is None else _constrain(leaf, one, rules, mesh, fallback))
        except LayoutError as error:
            where = path_text(keys_of(path))
            raise type(error)(f"{where}: {error}", error.problems) from None
    return jx.tree.unflatten(structure, done)


def constrain(x: jax.Array, names: tuple[Any, ...] | None) -> jax.Array:
    """What a layer does with its output: constrains it to `names` under the rules in scope.

    `names` are explicit (always in force), `default_names` (in force only under strict
    `AxisRules`, and only if their number fits the rank of `x`), or None (nothing happens).

    Raises like `with_logical_constraint`.

    >>> import jax.numpy as jnp
    >>> from shardflax.partitioning import default_names, make_mesh, preset, use
    >>> with use(make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")):
    ...     y = constrain(jnp.ones((4, 6)), default_names("batch", ..., "act_mlp"))
    >>> y.sharding.spec
    P('fsdp', 'tensor')
    """
    if names is None:
        return x
    rules = rules_in_scope()
    if isinstance(names, DefaultNames):
        expanded = in_force(names, np.ndim(x), rules)
        if expanded is None:
            return x
        names = expanded
    elif rules is None:
        _warn_no_rules(names)
    return _constrain(x, names, rules, None, RulesFallback.AXIS_IS_UNSHARDED)


def wanted_spec(shape: tuple[int, ...], names: tuple[Any, ...]) -> PartitionSpec | None:
    """The spec that `constrain` would put on an array of `shape`; None where it would put none.

    Raises nothing: what is wrong with the names is for `constrain` to say.

    >>> from shardflax.partitioning import make_mesh, preset, use
    >>> with use(make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")):
    ...     wanted_spec((4, 6), ("batch", "act_mlp"))
    P('fsdp', 'tensor')
    """
    rules, mesh = rules_in_scope(), mesh_in_scope()
    said = in_force(names, len(shape), rules)
    if said is None or not rules or mesh is None or init_trace() is not None:
        return None
    if isinstance(rules, AxisRules):
        found = resolve(tuple(said), rules.compute, shape, free_axes(mesh))
        return None if found.problems else found.spec
    if len(said) > len(shape):
        return None
    spec = PartitionSpec(*linen_axes(said, rules)[0])
    return None if check_spec(shape, spec, dict(free_axes(mesh)), "") else spec


def _constrain(
    x: Any,
    names: tuple[Any, ...],
    rules: LogicalRules | None,
    mesh: AnyMesh | None,
    fallback: RulesFallback,
) -> Any:
    """Constrains one array: resolve, check, lower."""
    if not _is_array(x):
        return x
    names, shape = tuple(names), tuple(np.shape(x))
    if isinstance(rules, AxisRules):
        return _constrain_strict(x, names, rules.compute, mesh)
    if len(names) > len(shape):
        text = f"{len(names)} names {names!r} for an array of rank {len(shape)}, shape {shape}."
        raise_problems([Problem(NamesRankError, text)])
    if not rules:
        return x
    axes, undecided = linen_axes(names, rules)
    if undecided and fallback is RulesFallback.RAISE_ERROR:
        raise undecided_error(names, undecided, rules)
    if undecided and fallback is RulesFallback.NO_CONSTRAINT:
        return x
    return constrain_spec(x, PartitionSpec(*axes), mesh, f"names {names!r}")


@functools.lru_cache(maxsize=1024)
def _mesh_problems(rules: AxisRules, sizes: tuple[tuple[str, int], ...]) -> tuple[Problem, ...]:
    """What `use` would refuse: meshes and rules also come into scope one by one."""
    return check_mesh_axes(rules, dict(sizes))


def _constrain_strict(
    x: Any, names: tuple[Any, ...], rules: AxisRules, mesh: AnyMesh | None
) -> Any:
    """Constrains one array under strict rules.

    While an init is traced its activations are dead code (and often of batch size 1): their names
    and rank are checked and recorded.  Nothing is constrained; but on explicit axes they lose what
    they have from the weights, or two of them could not meet.
    """
    trace, shape = init_trace(), tuple(np.shape(x))
    if trace is not None:
        trace.names.update(name for name in names if isinstance(name, str))
        trace.problems.extend(located(resolve(names, rules, shape).problems))
        return _whole(x)
    target = mesh_in_scope(mesh, x)
    if target is not None:
        raise_problems(_mesh_problems(rules, tuple(target.shape.items())))
    found = resolve(names, rules, shape, None if target is None else free_axes(target))
    raise_problems(located(found.problems))
    return x if target is None else lower(x, found.spec, target, f"names {names!r}")


def located(problems: Sequence[Problem], what: str = "constraint") -> list[Problem]:
    """The same, with the line of code, and the module whose method runs there.

    >>> located([])
    []
    """
    if not problems:
        return []
    where = f"{what} at {_caller()[0]}{_inside()}"
    return [replace(problem, where=where) for problem in problems]


def _inside() -> str:
    """Where in the model this is, in brackets: a path and a class; the root has no path."""
    module = current_module()
    scope = getattr(module, "scope", None)
    if scope is None:
        return ""
    where, kind = "/".join(scope.path), kind_of(module)
    return f" (in {where}, {kind})" if where else f" (in {kind}, the outermost module)"


def _whole(x: Any) -> Any:
    """`x` without explicit axes in its type."""
    sharding = jx.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types or not any(sharding.spec):
        return x
    spec = PartitionSpec(*[None] * np.ndim(x))
    return jx.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def constrain_spec(x: Any, spec: PartitionSpec, mesh: AnyMesh | None, what: str) -> Any:
    """Constrains one array to a spec of mesh axes; nothing without a mesh or on a non-array.

    Raises `UnknownAxisError`, `NamesRankError` or `IndivisibleDimError`; `what` says whose spec
    it is.

    >>> constrain_spec(1.0, PartitionSpec(), None, "a scalar")
    1.0
    """
    target = mesh_in_scope(mesh, x) if _is_array(x) and init_trace() is None else None
    if target is None:
        return x
    raise_problems(check_spec(tuple(np.shape(x)), spec, dict(free_axes(target)), what))
    return lower(x, spec, target, what)


def constrain_box(
    x: Any, names: tuple[Any, ...], rules: LogicalRules | None, mesh: AnyMesh | None
) -> Any:
    """Constrains the value of a box; without rules it is returned as it is, with no warning.

    While `init_sharded` traces, it is too: the layout checks and places the value, and a
    constraint in its way would change how XLA folds constants, and so the last bit of numbers.

    >>> constrain_box(1.0, (), None, None)
    1.0
    """
    if init_trace() is not None:
        return x
    rules = rules_in_scope() if rules is None else rules
    stored = rules.stored if isinstance(rules, AxisRules) else rules
    return _constrain(x, names, stored, mesh, RulesFallback.AXIS_IS_UNSHARDED)


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
        raise no_devices(what, spec, mesh.shape)
    try:
        if explicit is not None and auto is not None and not traced:
            return jx.jit(_lower, static_argnums=(1, 2, 3))(x, explicit, auto, mesh)
        return _lower(x, explicit, auto, mesh)
    except Exception as error:  # JAX's class for duplicates is an Exception and no more
        if "spmd_axis_name" in str(error) or "has duplicate entries" in str(error):
            raise mapped_over(what, spec) from error
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


def _is_array(x: Any) -> bool:
    """True for what JAX can constrain: not for a shape, nor for a box's stand-in value."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic, float, int, complex))


def _caller() -> tuple[str, tuple[str, int]]:
    """The first line outside of this package and of JAX on the stack: as text, and as a key."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith((_HERE, _JAX)):
        frame = frame.f_back
    if frame is None:
        return "an unknown line", ("", 0)
    key = (frame.f_code.co_filename, frame.f_lineno)
    return f"{key[0]}:{key[1]}", key


def _warn_no_rules(names: Any) -> None:
    """Says, once for each line of code, that a constraint does nothing."""
    text, key = _caller()
    if key not in _warned:
        _warned.add(key)
        warnings.warn(
            f"the constraint {names!r} at {text} does nothing: no rules are in scope. Enter "
            f"`partitioning.use(mesh, rules)`; `logical_axis_rules(())` says that none are "
            f"wanted.",
            NoRulesWarning,
            stacklevel=3,
        )
