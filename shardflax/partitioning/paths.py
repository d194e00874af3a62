"""Paths of leaves, as tuples of plain keys and as text."""

from __future__ import annotations

from typing import Any

from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

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
    attribute = _ATTRIBUTES.get(type(entry)) or _attribute(entry)
    return str(entry) if attribute is None else getattr(entry, attribute)


def _attribute(entry: Any) -> str | None:
    """Where a key of another kind has its value."""
    return next((name for name in ("key", "name", "idx") if hasattr(entry, name)), None)


_ATTRIBUTES = {
    DictKey: "key",
    FlattenedIndexKey: "key",
    GetAttrKey: "name",
    SequenceKey: "idx",
}
