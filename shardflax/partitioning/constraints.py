"""Constraints by logical names: the spec that they mean where they stand, and what is wrong.

`lowering` puts the spec on the array.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from shardflax.partitioning.call_site import located, warn_no_rules
from shardflax.partitioning.defaults import DefaultNames, in_force
from shardflax.partitioning.errors import (
    LayoutError,
    NamesRankError,
    Problem,
    raise_problems,
)
from shardflax.partitioning.given import as_names
from shardflax.partitioning.linen_rules import RulesFallback, linen_axes, undecided_error
from shardflax.partitioning.lowering import lower
from shardflax.partitioning.names_tree import names_of_leaves
from shardflax.partitioning.paths import keys_of, path_text
from shardflax.partitioning.resolve import check_mesh_axes, resolve
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.scope import (
    AnyMesh,
    free_axes,
    init_trace,
    mesh_in_scope,
    rules_in_scope,
)
from shardflax.partitioning.spec_check import check_spec
from shardflax.partitioning.untyped import jx

__all__ = [
    "constrain",
    "constrain_box",
    "constrain_spec",
    "wanted_spec",
    "with_logical_constraint",
]


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
        warn_no_rules(logical_axis_resources)

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
    else:
        names = as_names(names)
        if rules is None:
            warn_no_rules(names)
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
        raise_problems(located([Problem(NamesRankError, text)]))
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
    problems = check_spec(tuple(np.shape(x)), spec, dict(free_axes(target)), what)
    raise_problems(located(problems))
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


def _is_array(x: Any) -> bool:
    """True for what JAX can constrain: not for a shape, nor for a box's stand-in value."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic, float, int, complex))
