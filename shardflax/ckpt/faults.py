"""Named moments of a save, at which tests can let a process fail, hang or die."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["POINTS", "at", "listen"]

POINTS = (
    "staged",
    "folder",
    "group",
    "written",
    "reported",
    "merged",
    "described",
    "manifest",
    "rename",
    "renamed",
    "committed",
    "expired",
)
"""The moments in their order; "group" comes for each group of lots, from several threads."""

_listeners: list[Callable[[str], object]] = []


def at(point: str) -> None:
    """Says that a save has come to a moment.

    >>> at("staged")
    """
    for listener in tuple(_listeners):
        listener(point)


def listen(listener: Callable[[str], object]) -> Callable[[], None]:
    """Calls `listener` at every moment from now on; returns what ends that.

    >>> end = listen(print)
    >>> at("rename")
    rename
    >>> end()
    >>> at("rename")
    """
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)
