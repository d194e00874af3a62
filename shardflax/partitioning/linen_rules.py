"""Linen's contract: plain pairs resolve leniently, all or nothing, first match wins."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, cast

from jax.sharding import PartitionSpec

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import RepeatedNameError, UnknownNameError
from shardflax.partitioning.given import check_rules
from shardflax.partitioning.rules import LogicalRules

__all__ = ["RulesFallback", "linen_axes", "undecided_error"]


class RulesFallback(enum.Enum):
    """What a plain-pair rule list does with a name that it does not know.

    >>> RulesFallback("no_constraint")
    <RulesFallback.NO_CONSTRAINT: 'no_constraint'>
    """

    AXIS_IS_UNSHARDED = "axis_is_unsharded"
    RAISE_ERROR = "raise_error"
    NO_CONSTRAINT = "no_constraint"


def linen_axes(names: Sequence[Any], rules: LogicalRules) -> tuple[list[Any], list[int]]:
    """The entry of each dim under plain pairs, and the dims that no rule decided.

    Rules are tried in order.  One fires if its name is on a dim that has nothing yet and every
    one of its axes is free.  Entries that are not strings pass through and occupy what they name.

    Raises `RepeatedNameError` if a name stands on two dims.

    >>> linen_axes(("batch", "mlp"), [("batch", "data"), ("mlp", ("data", "model"))])
    (['data', None], [1])
    """
    check_rules(rules)
    repeated = [n for i, n in enumerate(names) if isinstance(n, str) and n in names[:i]]
    if repeated:
        raise RepeatedNameError(
            f"Unsupported: the names {tuple(dict.fromkeys(repeated))!r} occur more than once in "
            f"{tuple(names)!r}. Give the dims different names."
        )
    found: dict[int, Any] = {i: n for i, n in enumerate(names) if not isinstance(n, str)}
    used = set(_flat(list(found.values())))
    for name, axes in rules:
        dim = names.index(name) if name in names else None
        if dim is None or dim in found or used & set(_flat(axes)):
            continue
        found[dim] = _entry(axes)
        used |= set(_flat(axes))
    undecided = [dim for dim in range(len(names)) if dim not in found]
    return [found.get(dim) for dim in range(len(names))], undecided


def undecided_error(names: Sequence[Any], dims: Sequence[int], rules: LogicalRules) -> Exception:
    """The error of `RulesFallback.RAISE_ERROR`."""
    missing = [names[dim] for dim in dims]
    hint = did_you_mean(str(missing[0]), {name for name, _ in rules})
    return UnknownNameError(
        f"the names {missing!r} of {tuple(names)!r} did not match a rule: {hint}"
    )


def _entry(axes: Any) -> Any:
    """The axes of a rule as an entry of a spec; no axes are None."""
    return tuple(cast(Sequence[Any], axes)) or None if isinstance(axes, (tuple, list)) else axes


def _flat(axes: Any) -> list[Any]:
    """The axes inside an entry; neither None nor UNCONSTRAINED is an axis."""
    if isinstance(axes, (tuple, list)):
        return [flat for axis in cast(Sequence[Any], axes) for flat in _flat(axis)]
    return [] if axes is None or axes is PartitionSpec.UNCONSTRAINED else [axes]
