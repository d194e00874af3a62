"""Moving arrays to the layout that names mean: concrete ones now, traced ones in their program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from shardflax.core.boxes import is_box
from shardflax.core.staging import is_tracing
from shardflax.partitioning.errors import (
    MeshScopeError,
    NamesRankError,
    Problem,
    TreeMismatchError,
    UnknownNameError,
    no_devices,
    raise_problems,
)
from shardflax.partitioning.layout import Layout
from shardflax.partitioning.linen_rules import linen_axes
from shardflax.partitioning.lowering import lower
from shardflax.partitioning.names_tree import names_of_leaves, tree_problems
from shardflax.partitioning.paths import Path, keys_of, path_text
from shardflax.partitioning.resolve import MeshAxes, resolve
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.scope import (
    AnyMesh,
    devices_of,
    free_axes,
    mesh_in_scope,
    rules_in_scope,
)
from shardflax.partitioning.spec_check import canonical_spec, check_spec
from shardflax.partitioning.untyped import jx

__all__ = ["reshard"]


def reshard(
    tree: Any,
    names: Any,
    rules: LogicalRules | None = None,
    mesh: AnyMesh | None = None,
    *,
    donate: bool = False,
) -> Any:
    """Moves `tree`, an array or a tree of them, to the layout that `names` mean.

    `names` is one tuple of names for all arrays, a tree of such tuples, or a `Layout`, which
    brings its own rules and mesh.  None in place of a tuple is said replication: the arrays are
    gathered, and lie whole on each device.  `rules` and `mesh` default to those in scope; of
    strict rules it is the set that is given (`rules`, `rules.compute`, `rules.optimizer`).

    Concrete arrays (NumPy's too) are moved now, also from another mesh; with `donate` one by one,
    and the old ones are deleted.  Traced values get a constraint on auto axes and a reshard on
    explicit ones; abstract ones (`jax.ShapeDtypeStruct`) get the sharding.  Other leaves stay as
    they are.

    Raises, with the path, a `LayoutError` for names that do not fit an array, the rules, or the
    mesh; `TreeMismatchError` for a tree of names, or a layout, that is none of this tree;
    `MeshScopeError` where there is no mesh, one without devices, or a traced value to donate.

    >>> import jax.numpy as jnp
    >>> from shardflax.partitioning import make_mesh, preset, use
    >>> params = {"w": jnp.ones((8, 6)), "b": jnp.ones(6)}
    >>> with use(make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")):
    ...     params = reshard(params, {"w": ("embed", "mlp"), "b": ("mlp",)}, donate=True)
    ...     whole = reshard(params, None)
    >>> params["w"].sharding.spec, whole["w"].sharding.spec
    (P('fsdp', 'tensor'), P())
    """
    if isinstance(names, Layout):
        if rules is not None or mesh is not None:
            raise MeshScopeError(
                "reshard(tree, layout) takes rules and mesh from the layout: leave them out, or "
                "make a Layout with others."
            )
        mesh, moves = names.mesh, list(_by_layout(tree, names))
        structure = jx.tree.structure(tree)
    else:
        rules = rules_in_scope() if rules is None else rules
        flat, structure = jx.tree_util.tree_flatten_with_path(tree)
        mesh = mesh_in_scope(mesh, next((leaf for _, leaf in flat), None))
        said = names_of_leaves(names, tree)
        axes = None if mesh is None else free_axes(mesh)
        moves = [
            _move(keys_of(path), leaf, one, rules, axes)
            for (path, leaf), one in zip(flat, said, strict=True)
        ]
    raise_problems([problem for move in moves for problem in move.problems])
    if mesh is None:
        raise MeshScopeError(
            "reshard: no mesh is in scope, and none is given. Enter use(mesh, rules), or pass mesh."
        )
    return jx.tree.unflatten(structure, _moved(moves, mesh, donate))


@dataclass(frozen=True)
class _Move:
    """One leaf and where it goes; `spec` None leaves it alone."""

    where: str
    x: Any
    spec: PartitionSpec | None
    problems: tuple[Problem, ...] = ()


def _move(
    path: Path, x: Any, names: Any, rules: LogicalRules | None, axes: MeshAxes | None
) -> _Move:
    """The move of one leaf to the layout that `names` mean, with what is wrong with it."""
    where = path_text(path) or "the array"
    if not _is_array(x):
        return _Move(where, x, None)
    if names is None:
        return _Move(where, x, PartitionSpec())
    spec, problems = _spec(tuple(names), tuple(np.shape(x)), rules, axes)
    there = tuple(replace(p, where=where) for p in problems)
    return _Move(where, x, spec, there)


def _spec(
    names: tuple[Any, ...],
    shape: tuple[int, ...],
    rules: LogicalRules | None,
    axes: MeshAxes | None,
) -> tuple[PartitionSpec, Sequence[Problem]]:
    """What `names` mean for an array of `shape`, and what is wrong with them."""
    if isinstance(rules, AxisRules):
        found = resolve(names, rules, shape, axes)
        return found.spec, found.problems
    if len(names) > len(shape):
        text = f"{len(names)} names {names!r} for an array of rank {len(shape)}, shape {shape}."
        return PartitionSpec(), [Problem(NamesRankError, text)]
    if rules is None and any(isinstance(name, str) for name in names):
        text = (
            f"names {names!r}, and no rules are in scope. Enter use(mesh, rules), or pass rules; "
            f"None in place of a name says that the dim is replicated."
        )
        return PartitionSpec(), [Problem(UnknownNameError, text)]
    spec = PartitionSpec(*linen_axes(names, rules or ())[0])
    sizes = dict(axes or ())
    problems = [] if axes is None else check_spec(shape, spec, sizes, f"names {names!r}")
    return (spec if problems else canonical_spec(spec, sizes)), problems


def _by_layout(tree: Any, layout: Layout) -> Iterator[_Move]:
    """The moves of the leaves of `tree`, boxed or not, to their places in `layout`."""
    flat = jx.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
    paths = [keys_of(path) for path, _ in flat]
    leaves = {leaf.path: leaf for leaf in layout.leaves}
    raise_problems(list(tree_problems(list(leaves), paths, "layout's leaves")))
    for path, (_, box) in zip(paths, flat, strict=True):
        x, leaf = jx.tree.leaves(box)[0], leaves[path]
        shape = tuple(np.shape(x))
        problems = list(leaf.problems)
        if shape != leaf.shape:
            text = f"expected the shape {leaf.shape} of the layout, found {shape}."
            problems.append(Problem(TreeMismatchError, text, where=leaf.where))
        yield _Move(leaf.where, x, leaf.spec if _is_array(x) else None, tuple(problems))


def _moved(moves: Sequence[_Move], mesh: AnyMesh, donate: bool) -> list[Any]:
    """The leaves in their places: all concrete ones in one transfer."""
    done: list[Any] = [move.x for move in moves]
    now: list[int] = []
    for i, move in enumerate(moves):
        if move.spec is None:
            continue
        if isinstance(move.x, jax.ShapeDtypeStruct):
            sharding = NamedSharding(mesh, move.spec)
            done[i] = jax.ShapeDtypeStruct(move.x.shape, move.x.dtype, sharding=sharding)
        elif not is_tracing():
            now.append(i)
        elif donate:
            raise MeshScopeError(
                f"{move.where}: reshard(donate=True) of a traced value. Its buffer is that of the "
                f"program: donate the argument (jax.jit(..., donate_argnums=...))."
            )
        else:
            done[i] = lower(move.x, move.spec, mesh, move.where)
    if now:
        placed = _put([moves[i] for i in now], mesh, donate)
        for i, x in zip(now, placed, strict=True):
            done[i] = x
    return done


def _put(moves: Sequence[_Move], mesh: AnyMesh, donate: bool) -> list[Any]:
    """Concrete arrays in their places."""
    known = devices_of(mesh, traced=False)
    if isinstance(known, AbstractMesh):
        raise no_devices(moves[0].where, moves[0].spec, mesh.shape)
    places = [NamedSharding(known, _settled(move.x, move.spec, known)) for move in moves]
    if not donate:
        return jx.device_put([move.x for move in moves], places)
    # One by one: of a state that fills the devices there is room for one more array at a time.
    return [_given_up(move.x, place) for move, place in zip(moves, places, strict=True)]


def _given_up(x: Any, place: NamedSharding) -> Any:
    """`x` in its place; its old buffers are freed, unless they are those of the new array."""
    y = jx.device_put(x, place)  # its own donation warns of each buffer that has another size
    if isinstance(x, jax.Array) and not x.is_deleted() and not _buffers(x) & _buffers(y):
        x.delete()
    return y


def _buffers(x: Any) -> set[int]:
    """Where the shards of an array lie that this process holds."""
    return {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}


def _settled(x: Any, spec: PartitionSpec | None, mesh: AnyMesh) -> PartitionSpec:
    """The spec of a move, with each unconstrained dim as it lies now."""
    free = PartitionSpec.UNCONSTRAINED
    if spec is None or free not in tuple(spec):
        return spec or PartitionSpec()
    sharding: Any = getattr(x, "sharding", None)
    here = isinstance(sharding, NamedSharding) and sharding.mesh == mesh
    now = tuple(sharding.spec) if here else ()
    now += (None,) * (len(spec) - len(now))
    return PartitionSpec(
        *(old if new is free else new for new, old in zip(spec, now, strict=False))
    )


def _is_array(x: Any) -> bool:
    kinds = (jax.Array, np.ndarray, np.generic, float, int, complex, jax.ShapeDtypeStruct)
    return isinstance(x, kinds)
