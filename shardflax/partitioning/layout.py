"""`Layout`: how every leaf of a train state lies on a mesh."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import AxisType, NamedSharding

from shardflax.core.boxes import is_box
from shardflax.core.errors import did_you_mean
from shardflax.partitioning.boxes import LogicallyPartitioned, Partitioned
from shardflax.partitioning.constraints import lower
from shardflax.partitioning.derive import Parameter, derive, find_parameter
from shardflax.partitioning.errors import LayoutError, Problem, raise_problems
from shardflax.partitioning.leaf import Leaf, resolve_leaf
from shardflax.partitioning.paths import Path, keys_of
from shardflax.partitioning.resolve import check_mesh_axes
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.scope import AnyMesh, InitTrace
from shardflax.partitioning.spec_check import spec_axes
from shardflax.partitioning.table import layout_table, layout_text
from shardflax.partitioning.untyped import jx

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Layout"]


class Layout:
    """The names, spec and sharding of every leaf of a state, on one mesh under one set of rules.

    `state` is any tree of arrays or shapes, boxed or not: variables, or a whole train state.
    Boxes say the names of parameters.  Leaves outside of the parameters (optimizer moments,
    averages) take their names from the parameter that their path ends in.  Parameters are what
    stands under the key or attribute `params` of the state; without one, all of a mapping, or the
    first element of a tuple.

    Nothing is raised here: `problems` lists what is wrong, `check` raises it.  `trace` is the
    record of constraints that an init met.

    >>> import jax.numpy as jnp
    >>> from shardflax.partitioning import make_mesh, preset
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
        parameters: Path | None = None,
    ) -> None:
        self.mesh = mesh
        self.rules = rules
        self._trace = trace or InitTrace()
        flat = jx.tree_util.tree_leaves_with_path(state, is_leaf=is_box)
        self._treedef = jx.tree.structure(jx.tree.map(_nothing, state, is_leaf=is_box))
        entries = [(keys_of(path), leaf) for path, leaf in flat]
        self._root = _root(state, entries) if parameters is None else tuple(parameters)
        known = self._parameters(entries)
        self.leaves: tuple[Leaf, ...] = tuple(self._leaf(*entry, known) for entry in entries)

    def _parameters(self, entries: list[tuple[Path, Any]]) -> dict[Path, Parameter]:
        """The boxed parameters, by their path below the root."""
        return {
            path[len(self._root) :]: Parameter(
                path, tuple(_value(leaf).shape), tuple(leaf.names), self._rules_of(leaf)
            )
            for path, leaf in entries
            if isinstance(leaf, Partitioned) and self._holds(path)
        }

    def _holds(self, path: Path) -> bool:
        """True for the path of a parameter."""
        return path[: len(self._root)] == self._root

    def _rules_of(self, box: Partitioned) -> LogicalRules | None:
        """The rules for the names of a box, or None if they are mesh axes."""
        if not isinstance(box, LogicallyPartitioned):
            return None
        return self.rules if box.rules is None else box.rules

    def _leaf(self, path: Path, leaf: Any, known: dict[Path, Parameter]) -> Leaf:
        """The layout of one leaf: by its box, by the parameter it belongs to, or by neither."""
        value = _value(leaf)
        boxed = isinstance(leaf, Partitioned)
        owner = None if self._holds(path) else find_parameter(path, known)
        if boxed and (owner is None or len(leaf.names) == len(value.shape)):
            names, origin, rules = tuple(leaf.names), "its box", self._rules_of(leaf)
        elif owner is not None:
            derived = derive(path, tuple(value.shape), owner)
            names, origin, rules = derived.names, derived.origin, owner.rules
        elif value.size <= 1:
            names, origin, rules = (None,) * len(value.shape), "a single number", None
        else:
            names, origin, rules = None, "nothing names it", None
        return resolve_leaf(path, value, names, origin, self.mesh, rules)

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
        return self._tree(NamedSharding(self.mesh, leaf.spec) for leaf in self.leaves)

    @functools.cached_property
    def abstract(self) -> Any:
        """The tree of the state as `jax.ShapeDtypeStruct`s with shardings: a restore target."""
        return self._tree(
            jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, leaf.spec)
            )
            for leaf in self.leaves
        )

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
        """Names of strict rules that neither a leaf nor a constraint of the init has used."""
        if not isinstance(self.rules, AxisRules):
            return ()
        used = {name for leaf in self.leaves for name in leaf.names or ()} | self._trace.names
        return tuple(name for name in self.rules.names if name not in used)

    @property
    def unused_axes(self) -> tuple[str, ...]:
        """Mesh axes above size 1 that shard no leaf and that no rule in use names."""
        used = {axis for leaf in self.leaves for part in leaf.spec for axis in spec_axes(part)}
        if isinstance(self.rules, AxisRules):
            met = (self.rules.get(name) or () for name in self._trace.names)
            used |= {axis.rstrip("?") for axes in met for axis in axes}
        return tuple(
            axis for axis, size in self.mesh.shape.items() if size > 1 and axis not in used
        )

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything wrong: rules against the mesh, then each leaf, then constraints."""
        mesh: tuple[Problem, ...] = ()
        if isinstance(self.rules, AxisRules):
            mesh = check_mesh_axes(self.rules, dict(self.mesh.shape))
        leaves = (problem for leaf in self.leaves for problem in leaf.problems)
        return tuple(dict.fromkeys((*mesh, *leaves, *self._trace.problems)))

    def check(self) -> None:
        """Raises all `problems` as one `LayoutError`, if there are any."""
        raise_problems(self.problems)

    def leaf(self, path: str) -> Leaf:
        """The leaf at `path`, such as `'params/Dense_0/kernel'`.

        Raises `LayoutError` (did-you-mean) if there is none.
        """
        found = {leaf.where: leaf for leaf in self.leaves}
        if path not in found:
            raise LayoutError(f"no leaf at {path!r}: {did_you_mean(path, found)}")
        return found[path]

    def place(self, state: Any) -> Any:
        """`state` (unboxed, inside a trace) laid out; where axes are auto, `jit` does that."""
        if AxisType.Explicit not in self.mesh.axis_types:
            return state
        values = jx.tree.leaves(state)
        return self._tree(
            lower(x, leaf.spec, self.mesh) for x, leaf in zip(values, self.leaves, strict=True)
        )

    def rebuild(self, leaves: Iterable[Any]) -> Any:
        """A tree like the state, from its leaves in order."""
        return self._tree(leaves)

    def _tree(self, values: Iterable[Any]) -> Any:
        return jx.tree.unflatten(self._treedef, list(values))

    def __str__(self) -> str:
        return layout_text(self)

    def __rich__(self) -> Table:
        return layout_table(self)

    def __repr__(self) -> str:
        mesh = ",".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        return f"<Layout of {len(self.leaves)} leaves on {mesh}, {self.bytes_per_device} bytes>"


def _nothing(_: Any) -> int:
    """A leaf for the structure of a state without its boxes."""
    return 0


def _value(leaf: Any) -> Any:
    """The array or shape inside the boxes around a leaf; a Python number as a shape."""
    while is_box(leaf):
        leaf = leaf.value if isinstance(leaf, Partitioned) else leaf.unbox()
    return leaf if hasattr(leaf, "dtype") else jx.eval_shape(lambda: leaf)


def _root(state: Any, entries: list[tuple[Path, Any]]) -> Path:
    """Where the parameters of a state are (see `Layout`)."""
    tops = dict.fromkeys(path[0] for path, _ in entries if path)
    if "params" in tops:
        return ("params",)
    if isinstance(state, Mapping):
        return ()
    boxed = (path[0] for path, leaf in entries if path and isinstance(leaf, Partitioned))
    first = next(boxed, None)
    return () if first is None else (first,)
