"""Paths of leaves, as tuples of plain keys and as text."""

from __future__ import annotations

from typing import Any

__all__ = ["Path", "keys_of", "path_text"]

Path = tuple[Any, ...]


def keys_of(path: tuple[Any, ...]) -> Path:
    """The bare keys of a JAX key path.

    >>> import jax
    >>> keys_of(jax.tree_util.tree_leaves_with_path({"a": [1]})[0][0])
    ('a', 0)
    """
    return tuple(_key(entry) for entry in path)


def path_text(path: Path) -> str:
    """The path as text.

    >>> path_text(("params", "Dense_0", "kernel"))
    'params/Dense_0/kernel'
    """
    return "/".join(map(str, path))


def _key(entry: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)
