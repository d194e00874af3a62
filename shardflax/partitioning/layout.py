"""`Layout`: how every leaf of a train state lies on a mesh."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import LayoutError, Problem, kind_of, raise_problems
from shardflax.partitioning.given import check_mesh, check_rules
from shardflax.partitioning.leaf import Leaf, place_leaf
from shardflax.partitioning.lowering import lower
from shardflax.partitioning.overrides import freeze
from shardflax.partitioning.paths import Path
from shardflax.partitioning.resolve import check_mesh_axes
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.scope import AnyMesh, InitTrace, free_axes
from shardflax.partitioning.spec_check import spec_axes
from shardflax.partitioning.state_leaves import find_root, state_leaves
from shardflax.partitioning.state_names import StateNames
from shardflax.partitioning.table import layout_table, layout_text
from shardflax.partitioning.untyped import jx

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Layout", "check_layout"]


class Layout:
    """The names, spec and sharding of every leaf of a state, on one mesh under one set of rules.

    `state` is any tree of arrays or shapes, boxed or not: variables, or a whole train state.
    Parameters are what stands under the key or attribute `params` of the state; without one, all
    of a mapping, or the first element of a tuple; `parameters`, a path, says otherwise.  A leaf has
    the names that are said for its path (`names`, regular expressions for whole paths; the
    overrides of strict rules, for paths below the parameters), or those of its box.  Leaves outside
    of the parameters (optimizer moments, averages) take their names from the parameter that their
    path ends in.

    Parameters lie by the rules as they are, leaves that belong to one by `rules.optimizer`, and
    others (caches, statistics, batches) by `rules.compute`.

    Nothing is raised here: `problems` lists what is wrong, `check` raises it.  `trace` is the
    record of constraints that an init met.  Raises `OverrideError` for `names` that are none, and
    `LayoutError` for `parameters` that are not there, or for what is no mesh, or no rules.

    Pickled, it comes back with an abstract mesh: devices belong to their process.

    >>> import jax.numpy as jnp
    >>> from shardflax.partitioning import LogicallyPartitioned, make_mesh, preset
    >>> kernel = LogicallyPartitioned(jnp.ones((8, 16)), ("embed", "mlp"))
    >>> state = {"params": {"w": kernel}, "mu": {"w": jnp.ones((8, 16))}, "step": jnp.int32(0)}
    >>> layout = Layout(state, make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp"))
    >>> layout.specs["mu"]["w"]
    P('fsdp', 'tensor')
    >>> layout.unnamed
    ()
    """

    def __init__(
        self,
        state: Any,
        mesh: AnyMesh,
        rules: LogicalRules,
        trace: InitTrace | None = None,
        parameters: str | Path | None = None,
        names: Mapping[str, tuple[Any, ...]] | None = None,
    ) -> None:
        check_mesh(mesh)
        check_rules(rules)
        self.mesh = mesh
        self.rules = rules
        self._trace = trace or InitTrace()
        found, self._treedef = state_leaves(state)
        self._root = find_root(state, found, parameters)
        named = StateNames(found, self._root, rules, freeze(names or {}, "the state"))
        self._by_path = named.problems
        axes = free_axes(mesh)
        self.leaves: tuple[Leaf, ...] = tuple(
            place_leaf(leaf.path, leaf.value, named.of(leaf), axes) for leaf in found
        )

    @property
    def names(self) -> Any:
        """The tree of the state with the names of each leaf, a tuple; None where it has none."""
        return self._tree(leaf.names for leaf in self.leaves)

    @property
    def specs(self) -> Any:
        """The tree of the state with the `PartitionSpec` of each leaf."""
        return self._tree(leaf.spec for leaf in self.leaves)

    @functools.cached_property
    def shardings(self) -> Any:
        """The tree of the state with the `NamedSharding` of each leaf."""
        return self._tree(self._shardings())

    @functools.cached_property
    def abstract(self) -> Any:
        """The tree of the state as `jax.ShapeDtypeStruct`s with shardings: a restore target."""
        return self._tree(
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for leaf, sharding in zip(self.leaves, self._shardings(), strict=True)
        )

    def _shardings(self) -> list[NamedSharding]:
        """The sharding of each leaf; one object for one spec."""
        specs = {leaf.spec: NamedSharding(self.mesh, leaf.spec) for leaf in self.leaves}
        return [specs[leaf.spec] for leaf in self.leaves]

    @property
    def bytes_per_device(self) -> int:
        """Bytes that each device holds of the whole state."""
        return sum(leaf.bytes_per_device for leaf in self.leaves)

    @property
    def unnamed(self) -> tuple[str, ...]:
        """Paths of the leaves that nothing names: replicated, without anybody having said so."""
        return tuple(leaf.where for leaf in self.leaves if leaf.names is None)

    @property
    def unused_rules(self) -> tuple[str, ...]:
        """Names of strict rules of one's own that no leaf and no constraint of the init has used.

        Presets know more names than any model has: those are `unused_defaults`.
        """
        return self._unused(own=True)

    @property
    def unused_defaults(self) -> tuple[str, ...]:
        """The same of the rules that a preset brought."""
        return self._unused(own=False)

    def _unused(self, own: bool) -> tuple[str, ...]:
        if not isinstance(self.rules, AxisRules):
            return ()
        used = {name for leaf in self.leaves for name in leaf.names or ()} | self._trace.names
        mine = self.rules.own
        return tuple(n for n in self.rules.names if n not in used and (n in mine) == own)

    @property
    def unused_axes(self) -> tuple[str, ...]:
        """Mesh axes above size 1 that shard no leaf and that no rule in use names."""
        used = {axis for leaf in self.leaves for part in leaf.spec for axis in spec_axes(part)}
        if isinstance(self.rules, AxisRules):
            met = (self.rules.compute.get(name) or () for name in self._trace.names)
            used |= {axis.rstrip("?") for axes in met for axis in axes}
        return tuple(
            axis for axis, size in self.mesh.shape.items() if size > 1 and axis not in used
        )

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything wrong: rules against the mesh and the paths, each leaf, constraints."""
        mesh: tuple[Problem, ...] = ()
        if isinstance(self.rules, AxisRules):
            mesh = check_mesh_axes(self.rules, dict(self.mesh.shape))
        leaves = (problem for leaf in self.leaves for problem in leaf.problems)
        return tuple(dict.fromkeys((*mesh, *self._by_path, *leaves, *self._trace.problems)))

    def check(self) -> None:
        """Raises all `problems` as one `LayoutError`, if there are any.

        What is wrong with a parameter is not said again for its optimizer state.
        """
        said = {p.text for one in self.leaves if one.rule_set == "stored" for p in one.problems}
        again = {
            problem
            for leaf in self.leaves
            if leaf.rule_set == "optimizer"
            for problem in leaf.problems
            if problem.text in said
        }
        raise_problems([problem for problem in self.problems if problem not in again])

    def leaf(self, path: str) -> Leaf:
        """The leaf at `path`, such as `'params/Dense_0/kernel'`.

        Raises `LayoutError` (did-you-mean) if there is none.
        """
        found = {leaf.where: leaf for leaf in self.leaves}
        if path not in found:
            raise LayoutError(f"no leaf at {path!r}: {did_you_mean(path, found)}")
        return found[path]

    def is_parameter(self, leaf: Leaf) -> bool:
        """Whether one of `leaves` is a parameter, and not of the optimizer or of anything else."""
        return leaf.path[: len(self._root)] == self._root

    def below(self, leaf: Leaf) -> Path:
        """The path of a parameter below the root of the parameters."""
        return leaf.path[len(self._root) :]

    def place(self, state: Any) -> Any:
        """`state` (unboxed, inside a trace) laid out; where axes are auto, `jit` does that."""
        values = enumerate(jx.tree.leaves(state))
        return self._tree(self.place_leaf(number, value) for number, value in values)

    def place_leaf(self, number: int, value: Any) -> Any:
        """The same for one leaf, by its number in `leaves`."""
        explicit = AxisType.Explicit in self.mesh.axis_types
        return lower(value, self.leaves[number].spec, self.mesh) if explicit else value

    def rebuild(self, leaves: Iterable[Any]) -> Any:
        """A tree like the state, from its leaves in order."""
        return self._tree(leaves)

    def __copy__(self) -> Layout:
        return self  # it is never changed

    def __deepcopy__(self, _: Any) -> Layout:
        return self

    def __getstate__(self) -> dict[str, Any]:
        try:
            pickle.dumps(self._treedef)
        except Exception as error:  # whatever the parts of a user's state raise
            raise LayoutError(
                f"this Layout cannot be pickled, for the tree of its state cannot: {error}. Make "
                f"it again where it is wanted (abstract_layout), or send plain values: "
                f"lock(layout), or explain(layout, mesh, rules).to_dict()."
            ) from error
        mesh = self.mesh.abstract_mesh if isinstance(self.mesh, Mesh) else self.mesh
        kept = {key: part for key, part in vars(self).items() if key not in _WITH_DEVICES}
        return {**kept, "mesh": mesh}

    def _tree(self, values: Iterable[Any]) -> Any:
        return jx.tree.unflatten(self._treedef, list(values))

    def __str__(self) -> str:
        return layout_text(self)

    def __rich__(self) -> Table:
        return layout_table(self)

    def __repr__(self) -> str:
        mesh = ",".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        return f"<Layout of {len(self.leaves)} leaves on {mesh}, {self.bytes_per_device} bytes>"


_WITH_DEVICES = ("shardings", "abstract")  # made when asked for, and kept


def check_layout(layout: Any) -> None:
    """Raises `LayoutError` for what is no `Layout`.

    >>> check_layout({"params": {}})
    Traceback (most recent call last):
        ...
    shardflax.partitioning.errors.LayoutError: a Layout is expected, not a dict. Make one:
    abstract_layout(init, key, mesh=..., rules=...). That of an Explanation is its `layout`.
    """
    if not isinstance(layout, Layout):
        raise LayoutError(
            f"a Layout is expected, not {kind_of(layout)}. Make one: abstract_layout(init, key, "
            f"mesh=..., rules=...). That of an Explanation is its `layout`."
        )
