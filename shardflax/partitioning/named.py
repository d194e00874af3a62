"""Initializers that say the names of the dims of their value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jax.sharding import Mesh

from shardflax.core.boxes import is_box
from shardflax.core.rng import is_keyless
from shardflax.partitioning.boxes import LogicallyPartitioned, Partitioned
from shardflax.partitioning.defaults import DefaultNames
from shardflax.partitioning.errors import LayoutError, NamesRankError, RepeatedNameError
from shardflax.partitioning.explicit_init import call_initializer
from shardflax.partitioning.given import as_names, check_rules
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.scope import init_trace, rules_in_scope

__all__ = [
    "LogicalInit",
    "MeshInit",
    "NamedInit",
    "check_names",
    "named",
    "with_logical_partitioning",
    "with_partitioning",
]

Initializer = Callable[..., Any]


@dataclass(frozen=True)
class NamedInit:
    """An initializer whose value is boxed with logical names; made by `named`.

    >>> NamedInit(np.zeros, ("embed",))(3).names
    ('embed',)
    """

    fn: Initializer
    names: tuple[Any, ...] | None

    @property
    def keyless(self) -> bool:
        """Whether the key is ignored: see `shardflax.core.rng.is_keyless`."""
        return is_keyless(self.fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rules = rules_in_scope()
        if self.names is None or (isinstance(self.names, DefaultNames) and not _strict(rules)):
            return self.fn(*args, **kwargs)
        names = tuple(self.names)
        return self.box(call_initializer(self.fn, names, rules or (), args, kwargs))

    def box(self, value: Any) -> Any:
        """`value` in a box with the names, if they are in force; a box stays as it is."""
        if self.names is None:
            return value
        explicit = not isinstance(self.names, DefaultNames)
        if is_box(value):
            if explicit:
                raise LayoutError(
                    f"names {self.names!r} for a value that its initializer boxes already "
                    f"({type(value).__name__} with the names "
                    f"{getattr(value, 'names', None)!r}). Give the names in one of the two places."
                )
            return value
        if not explicit and not _strict(rules_in_scope()):
            return value
        names = tuple(self.names)
        check_names(names, value)
        return LogicallyPartitioned(value, names)


@dataclass(frozen=True)
class LogicalInit:
    """An initializer whose value is boxed; made by `with_logical_partitioning`.

    >>> LogicalInit(np.zeros, ("embed",)).box(np.zeros(3)).names
    ('embed',)
    """

    fn: Initializer
    names: tuple[Any, ...]
    mesh: Mesh | None = None
    rules: LogicalRules | None = None

    @property
    def keyless(self) -> bool:
        """Whether the key is ignored: see `shardflax.core.rng.is_keyless`."""
        return is_keyless(self.fn)

    def __call__(self, *args: Any, **kwargs: Any) -> LogicallyPartitioned:
        rules = rules_in_scope() if self.rules is None else self.rules
        return self.box(call_initializer(self.fn, self.names, rules or (), args, kwargs))

    def box(self, value: Any) -> LogicallyPartitioned:
        """`value` in the box that this initializer would give it."""
        check_names(self.names, value)
        return LogicallyPartitioned(value, self.names, self.mesh, self.rules)


@dataclass(frozen=True)
class MeshInit:
    """An initializer whose value is boxed with mesh axes; made by `with_partitioning`.

    >>> MeshInit(np.zeros, ("data",))(3).get_partition_spec()
    P('data',)
    """

    fn: Initializer
    names: tuple[Any, ...]
    mesh: Mesh | None = None

    @property
    def keyless(self) -> bool:
        """Whether the key is ignored: see `shardflax.core.rng.is_keyless`."""
        return is_keyless(self.fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Partitioned:
        return self.box(call_initializer(self.fn, self.names, None, args, kwargs))

    def box(self, value: Any) -> Partitioned:
        """`value` in the box that this initializer would give it."""
        check_names(self.names, value)
        return Partitioned(value, self.names, self.mesh)


def named(init_fn: Initializer, names: tuple[Any, ...] | None) -> NamedInit:
    """Wraps an initializer so that its value carries one logical name a dim.

    `names` are explicit, `default_names`, or None (no names).  The wrapper is frozen and hashable,
    and equal for equal arguments.

    Raises, when called, `NamesRankError` for names of another rank than the value, and
    `LayoutError` where explicit names meet an initializer that boxes its value itself.

    >>> import jax
    >>> init = named(jax.nn.initializers.zeros, ("embed", "mlp"))
    >>> init(jax.random.key(0), (2, 3)).names
    ('embed', 'mlp')
    """
    return NamedInit(init_fn, _frozen(names))


def with_logical_partitioning(
    fn: Initializer,
    names: tuple[Any, ...],
    mesh: Mesh | None = None,
    rules: LogicalRules | None = None,
) -> LogicalInit:
    """Wraps an initializer so that its value comes in a `LogicallyPartitioned` box.

    `mesh` and `rules` default to those in scope when the box is opened.  Raises `NamesRankError`,
    when called, for names of another rank than the value.

    >>> import jax
    >>> init = with_logical_partitioning(jax.nn.initializers.ones, ("embed", "mlp"))
    >>> init(jax.random.key(0), (2, 3)).names
    ('embed', 'mlp')
    """
    check_rules(rules, or_none=True)
    if rules is not None and not isinstance(rules, AxisRules):
        rules = tuple((name, _hashable(axes)) for name, axes in rules)
    return LogicalInit(fn, as_names(names), mesh, rules)


def with_partitioning(
    fn: Initializer, names: tuple[Any, ...], mesh: Mesh | None = None
) -> MeshInit:
    """Wraps an initializer so that its value comes in a `Partitioned` box: names are mesh axes.

    Raises `NamesRankError`, when called, for names of another rank than the value.

    >>> import jax
    >>> with_partitioning(jax.nn.initializers.ones, (None, "data"))(jax.random.key(0), (2, 3)).names
    (None, 'data')
    """
    return MeshInit(fn, as_names(names), mesh)


def _strict(rules: LogicalRules | None) -> bool:
    """True for rules that switch default names on."""
    return isinstance(rules, AxisRules)


def _hashable(axes: Any) -> Any:
    """The axes of a plain rule, so that the wrapper can be hashed."""
    return tuple(cast(list[Any], axes)) if isinstance(axes, list) else axes


def _frozen(names: Any) -> tuple[Any, ...] | None:
    """`names` as a tuple, so that the wrapper can be hashed."""
    return names if names is None or isinstance(names, DefaultNames) else as_names(names)


def check_names(names: tuple[Any, ...], value: Any) -> None:
    """Raises unless `names` has one entry for each dim of `value`, each name once.

    While `init_sharded` traces, nothing is raised: its layout finds the same, for all parameters
    at once and with their paths.
    """
    if init_trace() is not None:
        return
    shape = tuple(np.shape(value))
    if len(names) != len(shape):
        raise NamesRankError(
            f"{len(names)} names {names!r} for a value of rank {len(shape)}, shape {shape}. "
            f"Give one name a dim; None for a dim that is replicated."
        )
    said = [name for name in names if isinstance(name, str)]
    if len(set(said)) != len(said):
        raise RepeatedNameError(f"a name stands twice in {names!r}. Give each dim its own.")
