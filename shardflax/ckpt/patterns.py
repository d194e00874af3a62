"""Patterns of paths, and rules that rename components of them; what fits nothing is said."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from shardflax.ckpt.paths import Path, show

__all__ = ["Patterns", "Renaming", "covers", "idle_patterns"]

Patterns = bool | str | Sequence[str]
"""True for all leaves, or patterns of paths: `"params/head"`, `"*/bias"`."""
_MOST_KNOWN = 6
_STAR = re.compile(r"\*")


def covers(patterns: Patterns, path: Path) -> bool:
    """True if a path, or a folder that it is in, matches one of the patterns.

    >>> covers("params/head", ("params", "head", "kernel")), covers("*/bias", ("a", "kernel"))
    (True, False)
    """
    if isinstance(patterns, bool):
        return patterns
    text = show(path)
    return any(
        fnmatch.fnmatchcase(text, x) or fnmatch.fnmatchcase(text, f"{x}/*") for x in _many(patterns)
    )


def _many(patterns: str | Sequence[str]) -> Sequence[str]:
    return [patterns] if isinstance(patterns, str) else patterns


def idle_patterns(
    option: str, patterns: Patterns, paths: Collection[Path], of: str = "no leaf"
) -> list[str]:
    """A line for each pattern of an option that no path is like: it would do nothing.

    >>> idle_patterns("include", ["params", "parms/*"], [("params", "w")])
    ["include  parms/*  no leaf has a path like this; did you mean 'params/*'?"]
    """
    if isinstance(patterns, bool):
        return []
    idle = (x for x in _many(patterns) if not any(covers(x, path) for path in paths))
    return [f"{option:7}  {x}  {of} has a path like this; {_hint(x, paths)}" for x in idle]


def _hint(pattern: str, paths: Collection[Path]) -> str:
    """The pattern with components that there are, or what paths begin with."""
    known = {part for path in paths for part in show(path).split("/")}
    close = "/".join(_closest(part, known) for part in pattern.split("/"))
    if close != pattern and any(covers(close, path) for path in paths):
        return f"did you mean {close!r}?"
    first = list(dict.fromkeys(path[0] for path in paths if path))
    more = ", ..." if len(first) > _MOST_KNOWN else ""
    return f"paths begin with {', '.join(first[:_MOST_KNOWN]) or 'nothing'}{more}"


def _closest(part: str, known: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(part, known, 1)), part)


class Renaming:
    """Rules such as `{"encoder": "backbone", "Block_*": "layers_*"}`, for the paths of a state.

    Each rule changes the first place of a path where the components stand; `*` is any part of one.
    What a rule has written no other rule changes, so names can be swapped; what `*` alone stands
    for stays what it was.

    >>> swap = Renaming({"a": "b", "b": "a", "params/*": "*"})
    >>> swap(("params", "a", "w")), swap(("b", "a"))
    (('b', 'w'), ('a', 'b'))
    """

    def __init__(self, rules: Mapping[str, str]) -> None:
        self._rules = [
            (old, [_component(part) for part in old.split("/")], new) for old, new in rules.items()
        ]
        self._idle = dict.fromkeys(rules)

    def __call__(self, path: Path) -> Path:
        """The new path."""
        parts = [(part, False) for part in show(path).split("/")]
        changed = False
        for old, wanted, new in self._rules:
            for start in range(len(parts) - len(wanted) + 1):
                stars = _stars(wanted, parts[start : start + len(wanted)])
                if stars is not None:
                    parts[start : start + len(wanted)] = _filled(new, iter(stars))
                    self._idle.pop(old, None)
                    changed = True
                    break
        return tuple(part for part, _ in parts) if changed else path

    def problems(self, new: Mapping[Path, Path], old: Collection[Path]) -> Iterator[str]:
        """A line for each rule that makes no sense, or did nothing; and for paths in others."""
        for name, wanted, to in self._rules:
            if to.count("*") > sum(part.groups for part in wanted):
                yield f"rename   {name}  {to!r} has more * than it"
            if not all(to.split("/")):
                yield f"rename   {name}  {to!r} has an empty component; '{name}/*': '*' drops one"
        for name in sorted(self._idle):
            hint = _hint(name, old)
            yield f"rename   {name}  no saved leaf has it in its path; {hint}"
        if self._rules:
            for path in new:
                for above in (path[:i] for i in range(1, len(path))):
                    if above in new:
                        yield (
                            f"rename   {show(path)}  {show(new[path])} would be inside of "
                            f"{show(new[above])}"
                        )


def _component(part: str) -> re.Pattern[str]:
    return re.compile("([^/]*)".join(map(re.escape, part.split("*"))))


def _stars(
    wanted: Sequence[re.Pattern[str]], parts: Sequence[tuple[str, bool]]
) -> list[tuple[str, bool]] | None:
    """What the stars stand for, if these are the components that are meant.

    What a rule has written only `*` alone is like.
    """
    found: list[tuple[str, bool]] = []
    for pattern, (part, written) in zip(wanted, parts, strict=True):
        match = None if written and pattern != _ANY else pattern.fullmatch(part)
        if match is None:
            return None
        found += [(star, written) for star in match.groups()]
    return found


def _filled(new: str, stars: Iterator[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """New components, and whether a rule has written them."""
    return [
        next(stars, (part, True))
        if part == "*"
        else (_STAR.sub(lambda _: next(stars, ("*", True))[0], part), True)
        for part in new.split("/")
    ]


_ANY = _component("*")
