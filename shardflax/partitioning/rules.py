"""`AxisRules`: strict rules from logical names to mesh axes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, overload

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import InvalidRuleError

__all__ = ["AxisRules", "LogicalRules", "RuleAxes"]

RuleAxes = str | Sequence[str] | None
LogicalRules = Sequence[tuple[str, Any]]

_AXIS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\??")


@dataclass(frozen=True, init=False)
class AxisRules(Sequence[tuple[str, tuple[str, ...]]]):
    """Strict rules: which mesh axes each logical name takes.

    `rules` maps a name to its axes, as one string (`"fsdp fsdp2? expert"`), a sequence of axes,
    or None (replicated, said).  An axis with `?` may yield: if another dim of the array has taken
    it, or if it does not divide the dim.  Without `?` either is an error.  Rules are values:
    hashable, never changed, combined with `|` (the right side wins).  They are accepted wherever
    a sequence of pairs is, and are strict there.

    Raises `InvalidRuleError` for a name with two rules, an axis twice in a rule, or bad syntax.

    >>> rules = AxisRules({"batch": "data fsdp", "embed": "fsdp", "mlp": "fsdp? tensor"})
    >>> rules["mlp"]
    ('fsdp?', 'tensor')
    >>> (rules | {"embed": None})["embed"]
    ()
    """

    entries: tuple[tuple[str, tuple[str, ...]], ...]
    title: str = field(compare=False, repr=False)
    _table: Mapping[str, tuple[str, ...]] = field(compare=False, repr=False)
    _hash: int = field(compare=False, repr=False)

    def __init__(
        self,
        rules: Mapping[str, RuleAxes] | Iterable[tuple[str, RuleAxes]],
        *,
        title: str = "rules",
    ) -> None:
        pairs = cast(Any, rules).items() if isinstance(rules, Mapping) else rules
        entries = tuple((_name(name), _axes(name, axes)) for name, axes in pairs)
        table = dict(entries)
        if len(table) != len(entries):
            names = [name for name, _ in entries]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InvalidRuleError(
                f"{title}: more than one rule for {', '.join(map(repr, twice))}. Strict rules "
                f"have one rule a name; write all its axes in it, in order, '?' where one may "
                f"yield."
            )
        object.__setattr__(self, "entries", entries)
        object.__setattr__(self, "title", title)
        object.__setattr__(self, "_table", table)
        object.__setattr__(self, "_hash", hash(entries))

    def __hash__(self) -> int:
        return self._hash

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    @overload
    def __getitem__(self, index: int) -> tuple[str, tuple[str, ...]]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[str, tuple[str, ...]], ...]: ...
    @overload
    def __getitem__(self, index: str) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice | str) -> Any:
        return self._table[index] if isinstance(index, str) else self.entries[index]

    def get(self, name: str) -> tuple[str, ...] | None:
        """The axes of `name`, or None where no rule knows it."""
        return self._table.get(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The logical names that have a rule, in order."""
        return tuple(self._table)

    @property
    def axes(self) -> frozenset[str]:
        """Every mesh axis that some rule names, without `?`."""
        return frozenset(axis.rstrip("?") for _, axes in self.entries for axis in axes)

    def __or__(self, other: Mapping[str, RuleAxes] | AxisRules) -> AxisRules:
        """These rules with those of `other` in the place of their own; new names are added."""
        more = other if isinstance(other, AxisRules) else AxisRules(other, title="overrides")
        title = f"{self.title} | {more.title}"
        return AxisRules({**self._table, **dict(more.entries)}, title=title)

    def with_rules(self, **rules: RuleAxes) -> AxisRules:
        """These rules, changed for names that have a rule already.

        Raises `InvalidRuleError` (did-you-mean) for another name; `|` adds names.

        >>> AxisRules({"embed": "fsdp"}).with_rules(embed=None)["embed"]
        ()
        """
        for name in rules:
            if name not in self._table:
                hint = did_you_mean(name, self._table)
                raise InvalidRuleError(
                    f"{self.title}: no rule for {name!r} to change: {hint} To add a name, write "
                    f"rules | {{{name!r}: ...}}."
                )
        return self | rules

    def __str__(self) -> str:
        width = max((len(name) for name, _ in self.entries), default=0)
        lines = [f"{name:<{width}}  {' '.join(axes) or '-'}" for name, axes in self.entries]
        return "\n".join([self.title, *lines])


def _name(name: Any) -> str:
    """`name`, if it can be the name of a dim."""
    if not isinstance(name, str) or not name:
        raise InvalidRuleError(f"a rule's name is a non-empty string, not {name!r}.")
    return name


def _axes(name: str, axes: Any) -> tuple[str, ...]:
    """The axes of one rule as a tuple of strings."""
    if axes is None:
        return ()
    parts = tuple(axes.split()) if isinstance(axes, str) else tuple(axes)
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
