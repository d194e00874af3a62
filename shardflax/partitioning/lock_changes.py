"""What differs between two entries of a lock file, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from shardflax.partitioning.locked import LockedCollective, LockedLeaf, LockEntry
from shardflax.partitioning.table import bytes_text

__all__ = ["changes_between"]

_MOST_PATHS = 3


def changes_between(old: LockEntry, new: LockEntry) -> list[str]:
    """What is different in `new`, a line each: what it was -> what it is, and the bytes of it.

    Leaves that changed in the same way share a line.

    >>> leaf = LockedLeaf("float32[64]", "embed", "fsdp", 64)
    >>> whole = LockedLeaf("float32[64]", "embed", "-", 256)
    >>> before = LockEntry("fsdp=4", "fsdp", 128, {"a": leaf, "b": leaf})
    >>> after = LockEntry("fsdp=4", "fsdp", 512, {"a": whole, "b": whole})
    >>> print("\\n".join(changes_between(before, after)))
    bytes per device: 128 B -> 512 B (+384 B)
    ~ spec (fsdp) -> (-), +192 B a leaf: a, b
    """
    lines = [
        f"{what}: {was} -> {now}"
        for what, was, now in (("mesh", old.mesh, new.mesh), ("rules", old.rules, new.rules))
        if was != now
    ]
    if old.bytes_per_device != new.bytes_per_device:
        was, now = bytes_text(old.bytes_per_device), bytes_text(new.bytes_per_device)
        by = _by(new.bytes_per_device - old.bytes_per_device)
        lines.append(f"bytes per device: {was} -> {now} ({by})")
    lines += _leaves(old, new)
    if old.collectives != new.collectives:
        lines += _collectives(old, new)
    return lines


def _by(count: int) -> str:
    return f"{'-' if count < 0 else '+'}{bytes_text(abs(count))}"


def _leaves(old: LockEntry, new: LockEntry) -> Iterator[str]:
    same: dict[str, list[str]] = {}
    for path in dict.fromkeys((*old.leaves, *new.leaves)):
        before, after = old.leaves.get(path), new.leaves.get(path)
        if before != after:
            same.setdefault(_leaf(before, after), []).append(path)
    for what, paths in same.items():
        more = len(paths) - _MOST_PATHS
        rest = f" and {more} more" if more > 0 else ""
        yield f"{what}: {', '.join(paths[:_MOST_PATHS])}{rest}"


def _leaf(old: LockedLeaf | None, new: LockedLeaf | None) -> str:
    """How one leaf changed."""
    if old is None or new is None:
        sign, leaf = ("+", new) if old is None else ("-", old)
        size = 0 if leaf is None else leaf.bytes_per_device
        return f"{sign} {leaf}, {_by(size if sign == '+' else -size)} a leaf"
    parts = [
        f"{what} ({was}) -> ({now})" if what != "array" else f"{was} -> {now}"
        for what, was, now in (
            ("array", old.array, new.array),
            ("names", old.names, new.names),
            ("spec", old.spec, new.spec),
        )
        if was != now
    ]
    if old.bytes_per_device != new.bytes_per_device:
        parts.append(f"{_by(new.bytes_per_device - old.bytes_per_device)} a leaf")
    return f"~ {', '.join(parts)}"


def _collectives(old: LockEntry, new: LockEntry) -> Iterator[str]:
    if old.collectives is None or new.collectives is None:
        were, are = _known(old), _known(new)
        yield f"collectives: {were} -> {are}"
        return
    by = _total(new.collectives) - _total(old.collectives)
    yield f"collectives: {_total_text(old)} -> {_total_text(new)} a step ({_by(by)})"
    before, after = _counts(old.collectives), _counts(new.collectives)
    for key in sorted({*before, *after}):
        was, now = before.get(key, 0), after.get(key, 0)
        if was != now:
            sign = "+" if not was else "-" if not now else "~"
            times = f"{now} x" if not was else f"{was} x" if not now else f"{was} -> {now} x"
            yield f"  {sign} {times} {key[0]}"
    if old.compiler != new.compiler:
        yield f"  compiled by {old.compiler}, now by {new.compiler}"


def _known(entry: LockEntry) -> str:
    return "not recorded" if entry.collectives is None else f"{len(entry.collectives)} kinds"


def _total(collectives: Iterable[LockedCollective]) -> int:
    return sum(one.total for one in collectives)


def _total_text(entry: LockEntry) -> str:
    return bytes_text(_total(entry.collectives or ()))


def _counts(collectives: Iterable[LockedCollective]) -> dict[tuple[Any, ...], int]:
    """How often each runs, by text and what sorts it."""
    return {
        (f"{one}{'' if one.exact else ', each step of a loop'}", one.bytes): one.count
        for one in collectives
    }
