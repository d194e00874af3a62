"""Trees of specs and shardings, out of trees of boxes or of logical specs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardflax.core.boxes import is_box
from shardflax.core.errors import did_you_mean
from shardflax.partitioning.boxes import Partitioned
from shardflax.partitioning.errors import LayoutError, UnknownAxisError, raise_problems
from shardflax.partitioning.given import as_names, check_mesh
from shardflax.partitioning.linen_rules import linen_axes
from shardflax.partitioning.paths import keys_of, path_text
from shardflax.partitioning.resolve import resolve
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.scope import free_axes, get_logical_axis_rules, mesh_in_scope
from shardflax.partitioning.spec_check import spec_axes
from shardflax.partitioning.untyped import jx

__all__ = [
    "get_partition_spec",
    "get_sharding",
    "logical_to_mesh",
    "logical_to_mesh_axes",
    "logical_to_mesh_sharding",
]


def logical_to_mesh_axes(
    array_dim_names: Sequence[Any] | None, rules: LogicalRules | None = None
) -> PartitionSpec | None:
    """The spec of mesh axes for an array with these names; None for None.

    Plain pairs follow Linen's contract: they are tried in order, and one applies if its name is
    on a dim that has no axes yet and all of its axes are free; a name that no rule fits is
    unsharded.  `AxisRules` are strict, and know the sizes of axes if a mesh is in scope.

    Raises `RepeatedNameError` for a name on two dims; under strict rules any `LayoutError` that
    does not need the shape.

    >>> rules = [("batch", "X"), ("features", "X"), ("heads", "Y"), ("batch", "Z")]
    >>> logical_to_mesh_axes(("batch", "length", "heads", "features"), rules)
    P('X', None, 'Y', None)
    """
    if array_dim_names is None:
        return None
    rules = get_logical_axis_rules() if rules is None else rules
    names = as_names(array_dim_names)
    if isinstance(rules, AxisRules):
        mesh = mesh_in_scope()
        axes = None if mesh is None else free_axes(mesh)
        found = resolve(names, rules, None, axes)
        raise_problems(found.problems)
        return found.spec
    return PartitionSpec(*linen_axes(names, rules)[0])


def logical_to_mesh(tree: Any, rules: LogicalRules | None = None) -> Any:
    """`logical_to_mesh_axes` of every `PartitionSpec` of logical names in `tree`.

    >>> logical_to_mesh({"w": PartitionSpec("embed", "mlp")}, [("mlp", "model")])
    {'w': P(None, 'model')}
    """

    def one(spec: PartitionSpec) -> PartitionSpec | None:
        return logical_to_mesh_axes(tuple(spec), rules)

    return _map(one, tree, _is_spec)


def logical_to_mesh_sharding(tree: Any, mesh: Mesh, rules: LogicalRules | None = None) -> Any:
    """The sharding over `mesh` of every `PartitionSpec` of logical names in `tree`.

    Raises `UnknownAxisError` for an axis that the mesh lacks, and what `logical_to_mesh_axes`
    raises, with the path.

    >>> from shardflax.partitioning import make_mesh
    >>> mesh = make_mesh("data=4,model=2")
    >>> tree = {"w": PartitionSpec("embed", "mlp")}
    >>> logical_to_mesh_sharding(tree, mesh, [("mlp", "model")])["w"].spec
    P(None, 'model')
    """

    known = get_logical_axis_rules() if rules is None else rules
    check_mesh(mesh)

    def one(spec: PartitionSpec) -> NamedSharding:
        if not isinstance(known, AxisRules):
            return _sharding(mesh, PartitionSpec(*linen_axes(tuple(spec), known)[0]))
        found = resolve(tuple(spec), known, None, free_axes(mesh))
        raise_problems(found.problems)
        return _sharding(mesh, found.spec)

    return _map(one, tree, _is_spec)


def get_partition_spec(tree: Any) -> Any:
    """The names of every box of `tree` as a `PartitionSpec`.

    An array without a box gets an empty spec; what is no array, None.

    >>> import jax.numpy as jnp
    >>> tree = {"w": Partitioned(jnp.ones((4, 2)), ("data", None)), "b": jnp.ones(2)}
    >>> get_partition_spec(tree)
    {'b': P(), 'w': P('data', None)}
    """

    def one(x: Any) -> PartitionSpec | None:
        if isinstance(x, Partitioned):
            return x.get_partition_spec()
        return PartitionSpec() if hasattr(x, "shape") else None

    return jx.tree.map(one, tree, is_leaf=is_box)


def get_sharding(tree: Any, mesh: Mesh) -> Any:
    """The names of every box of `tree` as a sharding over `mesh`; they must be mesh axes.

    Raises `UnknownAxisError`, with the path, for an axis that the mesh lacks.

    >>> import jax.numpy as jnp
    >>> from shardflax.partitioning import make_mesh
    >>> tree = {"w": Partitioned(jnp.ones((4, 2)), ("data", None))}
    >>> get_sharding(tree, make_mesh("data=8"))["w"].spec
    P('data', None)
    """

    check_mesh(mesh)

    def one(x: Any) -> NamedSharding | None:
        if isinstance(x, Partitioned):
            return _sharding(x.mesh or mesh, x.get_partition_spec())
        return NamedSharding(mesh, PartitionSpec()) if hasattr(x, "shape") else None

    return _map(one, tree, is_box)


def _map(one: Callable[[Any], Any], tree: Any, is_leaf: Callable[[Any], bool]) -> Any:
    """`one` of each leaf; errors say which."""

    def at(path: Any, leaf: Any) -> Any:
        try:
            return one(leaf)
        except LayoutError as error:
            if not path:
                raise
            where = path_text(keys_of(path))
            raise type(error)(f"{where}: {error}", error.problems) from None

    return jx.tree_util.tree_map_with_path(at, tree, is_leaf=is_leaf)


def _sharding(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    for axis in (axis for entry in spec for axis in spec_axes(entry)):
        if axis not in mesh.shape:
            axes, hint = ", ".join(mesh.axis_names), did_you_mean(str(axis), mesh.axis_names)
            raise UnknownAxisError(
                f"{spec} names the axis {axis!r}, which the mesh ({axes}) lacks: {hint}"
            )
    return NamedSharding(mesh, spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
