"""Where a leaf lies in a state: a tuple of strings, the same for every kind of container."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from shardflax.ckpt.errors import CheckpointLeafError
from shardflax.core.boxes import unbox

__all__ = ["Path", "check_names", "leaves_by_path", "nest", "show"]

Path = tuple[str, ...]

ROOT: Path = ("value",)
"""The path of a state that is one array."""


def show(path: Path) -> str:
    """A path as users read it.

    >>> show(("params", "Dense_0", "kernel"))
    'params/Dense_0/kernel'
    """
    return "/".join(path)


def leaves_by_path(state: Any) -> dict[Path, Any]:
    """The leaves of a state, boxes taken off, by path.

    Raises CheckpointLeafError where two leaves have one path (dict keys `1` and `"1"`).

    >>> leaves_by_path({"opt": (1.0, {"mu": 2.0})})
    {('opt', '0'): 1.0, ('opt', '1', 'mu'): 2.0}
    """
    found: dict[Path, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(unbox(state)):
        path = tuple(_part(key) for key in keys) or ROOT
        if path in found:
            raise CheckpointLeafError(
                show(path), "two leaves have this path", "Rename one of the two dict keys."
            )
        found[path] = leaf
    return found


def _part(key: Any) -> str:
    """One key of a key path as a string."""
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name):
            return str(name)
        case GetAttrKey(name=name):
            return name
        case SequenceKey(idx=index):
            return str(index)
        case _:
            return str(key)


def check_names(paths: Iterable[Path]) -> None:
    """Refuses paths that would share storage: Orbax joins a path with dots into one name.

    Raises CheckpointLeafError, naming both leaves.

    >>> check_names([("a.b",), ("a", "b")])
    Traceback (most recent call last):
    shardflax.ckpt.errors.CheckpointLeafError: Cannot save leaf 'a/b': ...
    """
    taken: dict[str, Path] = {}
    for path in paths:
        if not all(path):
            raise CheckpointLeafError(show(path), "a dict key is empty", "Give it a name.")
        name = ".".join(path)
        if name in taken:
            raise _collision(path, taken[name])
        taken[name] = path
    for name, path in taken.items():
        for end in (i for i, char in enumerate(name) if char == "/"):
            if name[:end] in taken:
                raise _collision(path, taken[name[:end]])


def _collision(path: Path, other: Path) -> CheckpointLeafError:
    """The error for two leaves that would be stored in one place."""
    return CheckpointLeafError(
        show(path),
        f"it would share its storage with leaf {show(other)!r} (paths {path} and {other})",
        "Rename the dict key that has a '.' or '/' in it.",
    )


def nest(leaves: dict[Path, Any]) -> dict[str, Any]:
    """Nested dicts with the given leaves.

    >>> nest({("a", "b"): 1, ("c",): 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: dict[str, Any] = {}
    for (*parents, last), leaf in leaves.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
