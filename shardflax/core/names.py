"""Names: finite or cofinite sets of collection and stream names.

Everywhere a user may say *which* collections or RNG streams are meant, he may write `True` (all),
`False` (none), one name, a collection of names, or `DenyList` (all but these).  Inside, each of
these is one `Names`, closed under `&`, `|`, `-` and `~`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

from shardflax.core.errors import InvalidFilterError

__all__ = ["CollectionFilter", "DenyList", "Names", "in_filter"]


@dataclass(frozen=True, eq=True)
class DenyList:
    """A filter that admits every name but those that `deny` admits.

    >>> "intermediates" in Names.of(DenyList("intermediates"))
    False
    >>> "params" in Names.of(DenyList("intermediates"))
    True
    """

    deny: CollectionFilter


CollectionFilter = bool | str | Collection[str] | DenyList


@dataclass(frozen=True)
class Names:
    """A set of names, or (`cofinite`) all names but those.

    >>> params = Names.of("params")
    >>> "batch_stats" in ~params, "params" in (params | Names.of(True)) - params
    (True, False)
    """

    items: frozenset[str]
    cofinite: bool = False

    @classmethod
    def of(cls, spec: CollectionFilter | Names) -> Names:
        """The set that a filter means.

        Raises `InvalidFilterError` for anything that is no filter.
        """
        if isinstance(spec, Names):
            return spec
        if isinstance(spec, bool):
            return ALL if spec else NONE
        if isinstance(spec, str):
            return cls(frozenset((spec,)))
        if isinstance(spec, DenyList):
            return ~cls.of(spec.deny)
        return cls(_checked(spec))

    def __contains__(self, name: str) -> bool:
        return (name in self.items) != self.cofinite

    def __bool__(self) -> bool:
        return self.cofinite or bool(self.items)

    def __invert__(self) -> Names:
        return Names(self.items, not self.cofinite)

    def __and__(self, other: Names) -> Names:
        if self.cofinite and other.cofinite:
            return Names(self.items | other.items, True)
        if self.cofinite:
            return Names(other.items - self.items)
        if other.cofinite:
            return Names(self.items - other.items)
        return Names(self.items & other.items)

    def __or__(self, other: Names) -> Names:
        return ~(~self & ~other)

    def __sub__(self, other: Names) -> Names:
        return self & ~other


def _checked(spec: Any) -> frozenset[str]:
    if isinstance(spec, Collection):
        names = cast("Collection[Any]", spec)
        if all(isinstance(name, str) for name in names):
            return frozenset(names)
    raise InvalidFilterError(spec)


ALL = Names(frozenset(), cofinite=True)
NONE = Names(frozenset())


def in_filter(filter_like: CollectionFilter, col: str) -> bool:
    """True if the filter admits the name `col`.

    >>> in_filter(["params", "cache"], "cache")
    True
    """
    return col in Names.of(filter_like)
