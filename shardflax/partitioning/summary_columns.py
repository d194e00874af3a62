"""Tables of modules (`tabulate`) with columns that say how variables lie."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shardflax.core.summary import show_sharding
from shardflax.partitioning.explained import explain_leaf
from shardflax.partitioning.layout import Layout
from shardflax.partitioning.rules import LogicalRules
from shardflax.partitioning.scope import (
    AnyMesh,
    InitTrace,
    init_tracing,
    mesh_in_scope,
    rules_in_scope,
    use,
)

__all__ = ["TableSharding", "table_sharding"]


@dataclass(frozen=True)
class TableSharding:
    """How variables lie on a mesh, for a table.

    >>> import jax, jax.numpy as jnp
    >>> import shardflax.nn as nn
    >>> from shardflax.partitioning import make_abstract_mesh, preset
    >>> sharding = TableSharding(make_abstract_mesh("fsdp=4"), preset("fsdp"))
    >>> with sharding.scope():
    ...     variables = jax.eval_shape(nn.Dense(8).init, jax.random.key(0), jnp.ones((1, 16)))
    >>> sharding.lies({"params": {"w": jnp.ones(3)}})
    {('params', 'w'): ('(unnamed)', '(-)', 12)}
    """

    mesh: AnyMesh
    rules: LogicalRules

    @contextmanager
    def scope(self) -> Generator[None]:
        """Puts the mesh and the rules in scope; what is wrong with names is said in the table."""
        with use(self.mesh, self.rules), init_tracing(InitTrace()):
            yield

    def lies(self, variables: Any) -> Mapping[tuple[str, ...], tuple[str, str, int]]:
        """Names, spec and bytes per device of each array, by its path with the collection."""
        layout = Layout(variables, self.mesh, self.rules)
        found: dict[tuple[str, ...], tuple[str, str, int]] = {}
        for leaf in layout.leaves:
            one = explain_leaf(leaf, self.mesh, self.rules)
            names = _tuple(dim.name or "-" for dim in one.dims) if one.named else "(unnamed)"
            spec = _tuple("+".join(axes) or "-" for axes in one.spec)
            spec = f"{spec}, {one.problems[0]}" if one.problems else spec
            found[tuple(map(str, leaf.path))] = names, spec, one.bytes_per_device
        return found


def _tuple(parts: Iterable[str]) -> str:
    return f"({', '.join(parts)})"


def table_sharding(mesh: AnyMesh | None, rules: LogicalRules | None) -> TableSharding | None:
    """The columns of a table for a mesh and rules, or else those in scope; None without either.

    >>> table_sharding(None, None) is None
    True
    """
    mesh = mesh_in_scope() if mesh is None else mesh
    rules = rules_in_scope() if rules is None else rules
    return None if mesh is None or rules is None else TableSharding(mesh, rules)


show_sharding(table_sharding)
