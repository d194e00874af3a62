"""What differs between two entries of a lock file, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

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
    if old.memory != new.memory:
        lines += _memory(old.memory, new.memory)
    compiled = (old.collectives, old.memory) != (new.collectives, new.memory)
    if compiled and old.compiler and new.compiler and old.compiler != new.compiler:
        lines.append(f"compiled by {old.compiler}, now by {new.compiler}")
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
    before, after = _groups(old.collectives), _groups(new.collectives)
    for what in sorted({*before, *after}):
        was, now = before.get(what, {}), after.get(what, {})
        if was != now:
            yield f"  {_group(what, was, now)}"


def _memory(old: Mapping[str, int] | None, new: Mapping[str, int] | None) -> Iterator[str]:
    if old is None or new is None:
        known = "not recorded -> recorded" if old is None else "recorded -> not recorded"
        yield f"memory of the step: {known}"
        return
    for what in dict.fromkeys((*old, *new)):
        was, now = old.get(what, 0), new.get(what, 0)
        if was != now:
            sizes = f"{bytes_text(was)} -> {bytes_text(now)} ({_by(now - was)})"
            yield f"memory of the step, {what}: {sizes}"


def _known(entry: LockEntry) -> str:
    return "not recorded" if entry.collectives is None else f"{len(entry.collectives)} kinds"


def _total(collectives: Iterable[LockedCollective]) -> int:
    return sum(one.total for one in collectives)


def _total_text(entry: LockEntry) -> str:
    return bytes_text(_total(entry.collectives or ()))


_Group = dict[tuple[int, bool], LockedCollective]  # by size of each, and whether counts are exact


def _groups(collectives: Iterable[LockedCollective]) -> dict[str, _Group]:
    """Collectives by kind, axes and network."""
    groups: dict[str, _Group] = {}
    for one in collectives:
        what = f"{one.kind} over {one.axes} ({one.network})"
        groups.setdefault(what, {})[one.bytes, one.exact] = one
    return groups


def _group(what: str, old: _Group, new: _Group) -> str:
    """How the collectives of one kind changed: how many, how much, and of which sizes."""
    sign = "+" if not old else "-" if not new else "~"
    totals = [(sum(one.count for one in g.values()), _total(g.values())) for g in (old, new)]
    said = [f"{count} x, {bytes_text(size)}" for count, size in totals]
    by = _by(totals[1][1] - totals[0][1])
    whole = f"{said[0]} -> {said[1]}" if sign == "~" else said[0] if old else said[1]
    line = f"{sign} {what}: {whole} ({by})"
    if sign != "~":
        return line
    sizes = [_size(old.get(key), new.get(key)) for key in sorted({*old, *new}, reverse=True)]
    return f"{line}: {', '.join(filter(None, sizes))}"


def _size(old: LockedCollective | None, new: LockedCollective | None) -> str:
    """How those of one size changed; nothing, if they did not."""
    one = new or old
    was, now = old.count if old else 0, new.count if new else 0
    if one is None or was == now:
        return ""
    each = "" if one.exact else " in each step of a loop"
    return f"{was} -> {now} x {bytes_text(one.bytes)}{each}"
