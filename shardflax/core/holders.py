"""Values that may hold modules: any pytree among the fields and attributes of a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from shardflax.core.frozen_dict import FrozenDict, freeze
from shardflax.core.staging import jx

__all__ = ["find", "frozen", "is_holder", "replace"]

_PLAIN: dict[type, bool] = {
    list: True,
    tuple: True,
    dict: True,
    FrozenDict: True,
    type(None): False,
}


def is_holder(value: Any) -> bool:
    """True for a container: a pytree that is no leaf.

    >>> is_holder([1]), is_holder("text"), is_holder(None)
    (True, False, False)
    """
    kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType]
    known = _PLAIN.get(kind)
    if known is None:
        known = _PLAIN[kind] = not jx.tree_util.all_leaves([value])
    return known


def find(value: Any, is_item: Callable[[Any], bool]) -> list[Any]:
    """What `is_item` accepts, in `value` or in the containers that it is made of.

    >>> find([1, {"a": ("b", 2)}], lambda x: isinstance(x, str))
    ['b']
    """
    if is_item(value):
        return [value]
    if not is_holder(value):
        return []
    leaves = _leaves(value, is_item)
    if leaves is None:
        return [x for _, item in _items(value) for x in find(item, is_item)]
    return [x for x in leaves if is_item(x)]


def _leaves(value: Any, is_item: Callable[[Any], bool]) -> list[Any] | None:
    """The leaves of `value`; None if it has a dict whose keys have no order: that is no pytree."""
    try:
        return jx.tree.leaves(value, is_leaf=is_item)
    except (TypeError, ValueError):
        return None


def _items(value: Any) -> list[tuple[Any, Any]]:
    """The keys and values of a dict or sequence."""
    if isinstance(value, dict | FrozenDict):
        return [*cast("dict[Any, Any]", value).items()]
    return [*enumerate(cast("list[Any]", value))] if isinstance(value, list | tuple) else []


def replace(
    value: Any, is_item: Callable[[Any], bool], fn: Callable[[str, Any], Any], name: str = ""
) -> Any:
    """`value` with `fn(name, item)` for each item in it, named after its place.

    >>> replace([1, {"a": ("b", 2)}], lambda x: isinstance(x, str), lambda name, x: name, "at")
    [1, {'a': ('at_1_a_0', 2)}]
    """
    if is_item(value):
        return fn(name, value)
    if not find(value, is_item):
        return value
    if _leaves(value, is_item) is None:
        new = {key: replace(x, is_item, fn, f"{name}_{key}") for key, x in _items(value)}
        return new if isinstance(value, dict | FrozenDict) else tuple(new.values())

    def visit(path: Any, x: Any) -> Any:
        return fn("_".join([name, *map(_key, path)]), x) if is_item(x) else x

    return jx.tree.map_with_path(visit, value, is_leaf=is_item)


def _key(entry: Any) -> str:
    """A step of a path, as it appears in the names of modules."""
    kind = next(kind for kind in ("key", "idx", "name") if hasattr(entry, kind))
    return str(getattr(entry, kind))


def frozen(value: Any) -> Any:
    """`value` with tuples for lists and `FrozenDict`s for dicts, at any depth of them.

    >>> frozen([1, [2], {"a": [3]}])
    (1, (2,), FrozenDict({
        a: (3,),
    }))
    """
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return freeze({key: frozen(item) for key, item in items})
    if type(value) is list or type(value) is tuple:
        return tuple(frozen(item) for item in cast("list[Any]", value))
    return value
