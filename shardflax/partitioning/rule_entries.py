"""Reading rules: what a caller writes for names and axes, as a table, or what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from shardflax.partitioning.errors import InvalidRuleError, kind_of
from shardflax.partitioning.rule_sets import Table

__all__ = ["RuleAxes", "RuleTable", "table_of"]

RuleAxes = str | Sequence[str] | None
RuleTable = Mapping[str, RuleAxes] | Iterable[tuple[str, RuleAxes]]

_AXIS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\??")
_HOW = "Write a dict, {'embed': 'fsdp', 'norm': None}, or pairs."


def table_of(rules: RuleTable, title: str) -> Table:
    """Rules as a table.

    Raises `InvalidRuleError` for what is no table of rules, for a name with two rules, for what is
    no name or no axis, and for an axis twice in a rule.

    >>> table_of({"embed": "fsdp", "norm": None}, "mine")
    {'embed': ('fsdp',), 'norm': ()}
    """
    entries = tuple((_name(name), _axes(name, axes)) for name, axes in _pairs(rules, title))
    if len(dict(entries)) != len(entries):
        names = [name for name, _ in entries]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InvalidRuleError(
            f"{title}: more than one rule for {', '.join(map(repr, twice))}. Strict rules "
            f"have one rule a name; write all its axes in it, in order, '?' where one may "
            f"yield."
        )
    return dict(entries)


def _pairs(rules: Any, title: str) -> Sequence[tuple[Any, Any]]:
    """Names and what they take."""
    if isinstance(rules, str):
        raise InvalidRuleError(
            f"{title}: {rules!r} is no table of rules. {_HOW} The preset of this name is "
            f"preset({rules!r})."
        )
    if isinstance(rules, Mapping):
        return tuple(cast(Mapping[Any, Any], rules).items())
    if not isinstance(rules, Iterable):
        raise InvalidRuleError(f"{title}: {kind_of(rules)} is no table of rules. {_HOW}")
    pairs = tuple(cast(Iterable[Any], rules))
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(cast(Sequence[Any], pair)) != 2:
            raise InvalidRuleError(f"{title}: {pair!r} is no pair of a name and its axes. {_HOW}")
    return pairs


def _name(name: Any) -> str:
    """`name`, if it can be the name of a dim."""
    if not isinstance(name, str) or not name:
        raise InvalidRuleError(f"a rule's name is a non-empty string, not {name!r}.")
    return name


def _axes(name: str, axes: Any) -> tuple[str, ...]:
    """The axes of one rule as a tuple of strings."""
    if axes is None:
        return ()
    if isinstance(axes, str):
        parts: tuple[Any, ...] = tuple(axes.split())
    else:
        parts = tuple(cast(Iterable[Any], axes)) if isinstance(axes, Iterable) else (axes,)
    for part in parts:
        if not isinstance(part, str) or not _AXIS.fullmatch(part):
            raise InvalidRuleError(
                f"rule {name!r}: {part!r} is no axis. Write an axis name, with '?' after it if "
                f"it may yield: 'fsdp fsdp2? tensor'; None for a replicated dim."
            )
    bare = [part.rstrip("?") for part in parts]
    if len(set(bare)) != len(bare):
        raise InvalidRuleError(f"rule {name!r}: an axis stands twice in {' '.join(parts)!r}.")
    return parts
