"""Default names: what stock layers bring along, and strict rules switch on."""

from __future__ import annotations

from typing import Any

from shardflax.partitioning.rules import AxisRules, LogicalRules

__all__ = ["DefaultNames", "default_names", "in_force"]


class DefaultNames(tuple[Any, ...]):
    """Names that a layer brings along: in force only under strict rules.

    >>> isinstance(default_names("embed"), DefaultNames)
    True
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"default_names{super().__repr__()}"


def default_names(*names: Any) -> DefaultNames:
    """Marks names as a layer's default: in force only while strict `AxisRules` are in scope.

    One `...` stands for what the rank of the array asks for: nothing, or `'length'`.

    >>> default_names("batch", ..., "act_mlp")
    default_names('batch', Ellipsis, 'act_mlp')
    """
    return DefaultNames(names)


def in_force(
    names: tuple[Any, ...] | None, rank: int, rules: LogicalRules | None
) -> tuple[Any, ...] | None:
    """The names that hold for an array of `rank` under `rules`, or None.

    >>> in_force(default_names("batch", ..., "act_mlp"), 3, AxisRules({}))
    ('batch', 'length', 'act_mlp')
    >>> in_force(default_names("batch", "act_mlp"), 2, None) is None
    True
    """
    if names is None or not isinstance(names, DefaultNames):
        return names
    if not isinstance(rules, AxisRules):
        return None
    if ... not in names:
        return tuple(names) if len(names) == rank else None
    cut, missing = names.index(...), rank - (len(names) - 1)
    if missing not in (0, 1):
        return None
    return (*names[:cut], *("length",) * missing, *names[cut + 1 :])
