"""Boxes that name the dims of a variable: by mesh axis, or by logical name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardflax.core.boxes import AxisMetadata
from shardflax.partitioning.constraints import constrain_box, constrain_spec
from shardflax.partitioning.errors import (
    LayoutError,
    PartitioningUnspecifiedError,
    PartitionNameMismatchError,
    RepeatedNameError,
)
from shardflax.partitioning.packed import Packed, packed
from shardflax.partitioning.rules import LogicalRules

__all__ = ["PARTITION_NAME", "LogicallyPartitioned", "Partitioned"]

PARTITION_NAME = "partition_name"

_STATIC = {"pytree_node": False}  # for subclasses that are made by `struct.dataclass`


def _partition_name(box: Partitioned, params: Mapping[Any, Any]) -> Any:
    """The name that a transform's `metadata_params` give to the dim it adds or takes."""
    if PARTITION_NAME not in params:
        raise PartitioningUnspecifiedError(box)
    name = params[PARTITION_NAME]
    if isinstance(name, list | dict | set):
        raise LayoutError(
            f"a transform adds or takes a dim of a variable with the names {box.names!r}, and its "
            f"metadata_params name that dim {name!r}. Expected one name. {_PER_LEVEL}"
        )
    return name


_PER_LEVEL = (
    "For a name at each level of remat_scan write a list of mappings, the outermost first: "
    "metadata_params=[{'partition_name': 'stages'}, {'partition_name': 'layers'}]."
)


@packed
@dataclass(frozen=True)
class Partitioned(Packed, AxisMetadata):
    """A value whose dims are named by mesh axes.

    `names` has one entry a dim: an axis, a tuple of axes, or None (replicated).  `mesh` defaults
    to the one in scope when the box is opened.

    >>> import jax.numpy as jnp
    >>> Partitioned(jnp.ones((4, 2)), ("data", None)).get_partition_spec()
    P('data', None)
    """

    __slots__ = ()

    value: Any
    names: tuple[Any, ...] = field(metadata=_STATIC)
    mesh: Mesh | None = field(default=None, metadata=_STATIC)

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The value, constrained to its names where a mesh is given or in scope.

        Raises `UnknownAxisError` or `IndivisibleDimError`, which JAX raises without the names.
        """
        if not apply_constraint:
            return self.value
        return constrain_spec(
            self.value, self.get_partition_spec(), self.mesh, f"names {self.names!r}"
        )

    def replace_boxed(self, val: Any) -> Self:
        """The same box around another value."""
        return dataclasses.replace(self, value=val)

    def replace(self, **updates: Any) -> Self:
        """The box with other fields."""
        return dataclasses.replace(self, **updates)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> Self:
        """The box with the name `params['partition_name']` put in for a dim at `index`.

        Raises `PartitioningUnspecifiedError` without that key, and `RepeatedNameError` for a name
        that the box has already.
        """
        name = _partition_name(self, params)
        if isinstance(name, str | tuple) and name in self.names:
            one = f"A tuple is one name, of one dim. {_PER_LEVEL}"
            raise RepeatedNameError(
                f"a transform adds a dim named {name!r} to a variable with the names "
                f"{self.names!r}, which have it already. Give nested transforms different "
                f"names: metadata_params={{'partition_name': ...}}."
                f"{' ' + one if isinstance(name, tuple) else ''}"
            )
        names = list(self.names)
        if index < 0:
            index += len(names) + 1
        names += [None] * (index - len(names))
        names.insert(index, name)
        return self.replace(names=tuple(names))

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> Self:
        """The box without the name of the dim at `index`, which must be the one in `params`.

        Raises `PartitioningUnspecifiedError` without a name, `PartitionNameMismatchError` if
        another one is found there.
        """
        name = _partition_name(self, params)
        names = list(self.names)
        found = names.pop(index) if -len(names) <= index < len(names) else "nothing"
        if found != name:
            raise PartitionNameMismatchError(
                f"a transform takes dim {index} named {name!r} away from a variable with the "
                f"names {self.names!r}, where {found!r} stands. Write "
                f"metadata_params={{'partition_name': {found!r}}}, or the axis at which the "
                f"variable was stacked."
            )
        return self.replace(names=tuple(names))

    def get_partition_spec(self) -> PartitionSpec:
        """The names as a `PartitionSpec`."""
        return PartitionSpec(*self.names)

    def get_sharding(self, mesh: Mesh) -> NamedSharding:
        """The names as a sharding over `mesh` (or over the box's own mesh, if it has one)."""
        return NamedSharding(self.mesh or mesh, self.get_partition_spec())


@packed
@dataclass(frozen=True)
class LogicallyPartitioned(Partitioned):
    """A value whose dims have logical names.

    `rules` and `mesh` default to those in scope when the box is opened.

    >>> import jax.numpy as jnp
    >>> box = LogicallyPartitioned(jnp.ones((4, 2)), ("embed", "mlp"))
    >>> box.add_axis(0, {"partition_name": "layers"}).names
    ('layers', 'embed', 'mlp')
    """

    __slots__ = ()

    rules: LogicalRules | None = field(default=None, metadata=_STATIC)

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The value, constrained by the box's rules or those in scope, where there is a mesh.

        Raises what `with_logical_constraint` raises.
        """
        if not apply_constraint:
            return self.value
        return constrain_box(self.value, self.names, self.rules, self.mesh)
