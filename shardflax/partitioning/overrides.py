"""Names by path: for parameters, and for what methods of modules that one did not write return.

An override is a regular expression and names.  It matches a path as a whole; where several match,
they must say the same.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from jax.sharding import PartitionSpec

from shardflax.core.errors import did_you_mean
from shardflax.partitioning.errors import OverrideError, Problem, kind_of

__all__ = ["Overrides", "call_paths", "find_names", "freeze", "is_named", "merge", "unmatched"]

Overrides = tuple[tuple[str, Any], ...]


def freeze(overrides: Mapping[str, Any], what: str, lists: bool = False) -> Overrides:
    """A mapping of regular expressions to names as a hashable value, checked.

    With `lists`, names may be a list: one entry (names, or None) for each element of a tuple; or a
    dict, of which each key is one of a dict.
    Raises `OverrideError`.

    >>> freeze({".*/kernel": ("embed", "mlp")}, "params")
    (('.*/kernel', ('embed', 'mlp')),)
    """
    if not isinstance(cast(Any, overrides), Mapping):
        raise OverrideError(
            f"overrides of {what}: {kind_of(overrides)} is no dict of names by path. Write "
            f"{{'.*/kernel': ('embed', 'mlp')}}."
        )
    return tuple((_pattern(p, what), _names(p, n, what, lists)) for p, n in overrides.items())


def merge(first: Overrides, second: Overrides) -> Overrides:
    """Both; of two with one expression, the second's.

    >>> merge((("a", ("x",)), ("b", ("y",))), (("a", ("z",)),))
    (('a', ('z',)), ('b', ('y',)))
    """
    return tuple({**dict(first), **dict(second)}.items()) if second else first


@functools.lru_cache(maxsize=65536)
def find_names(overrides: Overrides, paths: tuple[str, ...], what: str) -> Any:
    """The names for something with these `paths` (other words for one thing), None without any.

    Raises `OverrideError` if two expressions match and say different names.

    >>> find_names(freeze({"enc/.*": ("embed",)}, "params"), ("enc/bias",), "params")
    ('embed',)
    """
    found = _matching(overrides, paths)
    if len({names for _, names in found}) > 1:
        said = ", ".join(f"{pattern!r}: {names!r}" for pattern, names in found)
        raise OverrideError(
            f"the overrides of {what} for {paths[0]!r} differ: {said}. Write expressions of which "
            f"one matches, such as {re.escape(paths[0])!r}."
        )
    return found[0][1] if found else None


def call_paths(path: str) -> tuple[str, ...]:
    """What an override may call the method at `path`: a module's `__call__` is the module.

    >>> call_paths("enc/__call__"), call_paths("enc/decode")
    (('enc/__call__', 'enc'), ('enc/decode',))
    """
    module, _, method = path.rpartition("/")
    return (path, module) if method == "__call__" else (path,)


def is_named(overrides: Overrides, paths: tuple[str, ...]) -> bool:
    """Whether an expression matches one of `paths`, whatever it says; raises nothing.

    >>> is_named((("enc/.*", ("embed",)), ("enc/bias", ())), ("enc/bias",))
    True
    """
    return bool(_matching(overrides, paths))


@functools.lru_cache(maxsize=65536)
def _matching(overrides: Overrides, paths: tuple[str, ...]) -> Overrides:
    """The overrides for something with these paths."""
    return tuple((p, n) for p, n in overrides if any(re.fullmatch(p, path) for path in paths))


def unmatched(overrides: Overrides, paths: Iterable[str], what: str) -> tuple[Problem, ...]:
    """A problem for each expression that matches none of `paths`.

    >>> print(*unmatched(freeze({"b/w": ("x",)}, "params"), ["a/w"], "params"))
    the override of params 'b/w' matches nothing: did you mean 'a/w'? It must match a whole path.
    """
    known = sorted(set(paths))
    return tuple(
        Problem(
            OverrideError,
            f"the override of {what} {pattern!r} matches nothing: "
            f"{did_you_mean(pattern, known)} It must match a whole path.",
        )
        for pattern, _ in overrides
        if not any(re.fullmatch(pattern, path) for path in known)
    )


def _pattern(pattern: Any, what: str) -> str:
    """`pattern`, if it is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise OverrideError(f"overrides of {what}: {pattern!r} is no expression: {error}") from None
    return pattern


def _names(pattern: str, names: Any, what: str, lists: bool) -> Any:
    """The names of one override as a hashable value."""
    if lists and isinstance(names, Mapping):
        said = cast(Mapping[str, Any], names).items()
        return ("keys", tuple((k, _names(pattern, n, what, lists)) for k, n in said))
    if lists and isinstance(names, list):
        parts = cast(Sequence[Any], names)
        return ("each", *(None if n is None else _names(pattern, n, what, lists) for n in parts))
    good = isinstance(names, tuple) and all(map(_is_name, cast(tuple[Any, ...], names)))
    if not good:
        raise OverrideError(
            f"overrides of {what}: {pattern!r} has {names!r} for names. Write a tuple with one "
            f"name, or None, for each dim{', or a list or dict of such tuples' if lists else ''}."
        )
    return cast(Any, names)


def _is_name(name: Any) -> bool:
    return name is None or isinstance(name, str) or name is PartitionSpec.UNCONSTRAINED
