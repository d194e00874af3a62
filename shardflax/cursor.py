"""Cursors: changes of immutable, nested structures, written as if they were made in place.

>>> from shardflax.cursor import cursor
>>> params = {"dense": {"kernel": 1, "layers": (2, 3)}}
>>> c = cursor(params)
>>> c["dense"]["kernel"] = 10
>>> c["dense"]["layers"][1] *= 10
>>> c.build()
{'dense': {'kernel': 10, 'layers': (2, 30)}}
>>> params
{'dense': {'kernel': 1, 'layers': (2, 3)}}
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, Generic, NamedTuple, TypeVar, cast

from shardflax.core.errors import FlaxError
from shardflax.core.frozen_dict import FrozenDict

__all__ = ["Cursor", "CursorFindError", "cursor"]

A = TypeVar("A")


class CursorFindError(FlaxError):
    """`find` is to select one object, and its condition selects none or several.

    >>> print(CursorFindError([]))
    find: one object should meet the condition; none does.
    >>> print(CursorFindError(["a/b", "c"]))
    find: one object should meet the condition; 2 do: a/b, c. Use find_all, or ask for more.
    """

    def __init__(self, paths: list[str]) -> None:
        found = f"{len(paths)} do: {', '.join(paths[:5])}. Use find_all, or ask for more."
        found = found if paths else "none does."
        super().__init__(f"find: one object should meet the condition; {found}")


class _Parent(NamedTuple):
    cursor: Any
    key: Any


_BINARY = (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"),
    *("lshift", "rshift", "and_", "or_", "xor"),
)


def _operators(cls: Any) -> Any:
    """Adds the operators of Python: a cursor computes with what it stands for."""

    def binary(fn: Callable[..., Any], swap: bool = False) -> Callable[..., Any]:
        if swap:
            return lambda self, other: fn(_value(other), _value(self))
        return lambda self, other: fn(_value(self), _value(other))

    for name in _BINARY:
        fn, plain = getattr(operator, name), name.rstrip("_")
        setattr(cls, f"__{plain}__", binary(fn))
        setattr(cls, f"__r{plain}__", binary(fn, swap=True))
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(cls, f"__{name}__", binary(getattr(operator, name)))
    for name in ("neg", "pos", "abs", "invert"):
        fn = getattr(operator, name)
        setattr(cls, f"__{name}__", lambda self, fn=fn: fn(_value(self)))
    cls.__hash__ = None
    return cls


def _value(x: Any) -> Any:
    return x.build() if isinstance(x, Cursor) else x


@_operators
class Cursor(Generic[A]):
    """Stands for one place of a nested structure of dicts, lists, tuples and dataclasses.

    `c[key]` and `c.name` go to a place inside; assigning to them notes a change, which leaves the
    structure itself alone; `build` makes the changed copy.  Changes are kept by the whole tree of
    cursors.  Python's operators work on what the cursor stands for.

    >>> c = cursor({"a": [1, 2]})
    >>> c["a"][0] + 1
    2
    """

    __slots__ = ("_assigned", "_changes", "_obj", "_parent_key")

    _assigned: bool  # what it stands for is itself a change
    _obj: Any
    _parent_key: _Parent | None
    _changes: dict[Any, Any]

    def __init__(self, obj: A, parent_key: Any = None) -> None:
        object.__setattr__(self, "_obj", obj)
        object.__setattr__(self, "_parent_key", parent_key)
        object.__setattr__(self, "_changes", {})
        object.__setattr__(self, "_assigned", False)

    @property
    def _root(self) -> Any:
        parent = self._parent_key
        return self if parent is None else parent.cursor._root

    @property
    def _path(self) -> str:
        parent = self._parent_key
        if parent is None:
            return ""
        return f"{parent.cursor._path}/{parent.key}".lstrip("/")

    # --- going inside

    def _child(self, key: Any, value: Any) -> Cursor[Any]:
        found = self._changes.get(key)
        if isinstance(found, Cursor):
            return found
        child: Cursor[Any] = Cursor(self._changes.get(key, value), _Parent(self, key))
        object.__setattr__(child, "_assigned", key in self._changes)
        self._changes[key] = child
        return child

    def __getitem__(self, key: Any) -> Cursor[Any]:
        if key in self._changes:
            return self._child(key, None)
        try:
            return self._child(key, self._obj[key])
        except (KeyError, IndexError) as error:
            kind = type(self._obj).__name__
            text = f"cursor at {self._path or 'the top'}: the {kind} has no item {key!r}."
            raise type(error)(text) from None

    def __getattr__(self, name: str) -> Cursor[Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._changes:
            return self._child(name, None)
        if not hasattr(self._obj, name):
            where = self._path or "the top"
            raise AttributeError(f"cursor at {where}: {type(self._obj).__name__} has no {name!r}.")
        return self._child(name, getattr(self._obj, name))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._changes[key] = _value(value)

    def __setattr__(self, name: str, value: Any) -> None:
        self._changes[name] = _value(value)

    def __len__(self) -> int:
        return len(_value(self))

    def __iter__(self) -> Iterator[Cursor[Any]]:
        if not isinstance(self._obj, list | tuple):
            raise NotImplementedError(
                f"a cursor goes through lists and tuples, not {type(self._obj).__name__}."
            )
        return (self[i] for i in range(len(self._obj)))

    def __repr__(self) -> str:
        return f"Cursor({_value(self)!r})"

    # --- changing

    def build(self) -> A:
        """A copy of what this cursor stands for, with all changes noted at and below it.

        >>> c = cursor([1, [2]])
        >>> c[1][0] = 3
        >>> c.build(), c[1].build()
        ([1, [3]], [3])
        """
        changes = {k: _value(c) for k, c in self._changes.items() if not _is_only_read(c)}
        return cast("A", _replaced(self._obj, changes) if changes else self._obj)

    def set(self, value: Any) -> Any:
        """Notes a change of this place, and builds the whole structure.

        >>> cursor({"a": [1, 2]})["a"][0].set(5)
        {'a': [5, 2]}
        """
        parent = self._parent_key
        if parent is None:
            return _value(value)
        parent.cursor._changes[parent.key] = _value(value)
        return self._root.build()

    def apply_update(self, update_fn: Callable[[str, Any], Any]) -> Cursor[A]:
        """Notes `update_fn(path, value)` as the change of each place below, where it differs.

        `path` is like `"dense/kernel"`.  Containers come before what they hold, and what
        `update_fn` replaced is not gone into.

        >>> c = cursor({"a": 1, "b": {"c": 2}})
        >>> c.apply_update(lambda path, x: 10 * x if path.endswith("c") else x).build()
        {'a': 1, 'b': {'c': 20}}
        """
        for key, value in _items(self._obj):
            path = f"{self._path}/{key}".lstrip("/")
            updated = update_fn(path, value)
            if updated is not value:
                self._changes[key] = updated
            elif _items(value):
                self._child(key, value).apply_update(update_fn)
        return self

    def find_all(self, cond_fn: Callable[[str, Any], bool]) -> Iterator[Cursor[Any]]:
        """Cursors at all places below for which `cond_fn(path, value)` is true.

        >>> c = cursor({"a": {"k": 1}, "b": {"k": 2}})
        >>> [found.build() for found in c.find_all(lambda path, x: path.endswith("k"))]
        [1, 2]
        """
        for key, value in _items(self._obj):
            child = self._child(key, value)
            if cond_fn(child._path, value):
                yield child
            yield from child.find_all(cond_fn)

    def find(self, cond_fn: Callable[[str, Any], bool]) -> Cursor[Any]:
        """The cursor at the one place below for which `cond_fn(path, value)` is true.

        Raises `CursorFindError` if there is none, or more than one.

        >>> cursor({"a": {"k": 1}, "b": 2}).find(lambda path, x: path == "a/k").set(5)
        {'a': {'k': 5}, 'b': 2}
        """
        found = list(self.find_all(cond_fn))
        if len(found) != 1:
            raise CursorFindError([c._path for c in found])
        return found[0]


def _is_only_read(change: Any) -> bool:
    """True for a cursor at a place where, and below which, nothing was changed."""
    return isinstance(change, Cursor) and not change._assigned and change.build() is change._obj


def _is_dataclass(x: Any) -> bool:
    return dataclasses.is_dataclass(x) and not isinstance(x, type)


def _items(x: Any) -> list[tuple[Any, Any]]:
    """The keys or names of a container with their values; nothing for what is no container."""
    if isinstance(x, Mapping):
        return list(x.items())
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return list(x._asdict().items())  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(x, list | tuple):
        return list(enumerate(x))
    if _is_dataclass(x):
        return [(f.name, getattr(x, f.name)) for f in dataclasses.fields(x) if f.init]
    return []


def _replaced(x: Any, changes: dict[Any, Any]) -> Any:
    """A copy of a container with some of its items replaced."""
    if isinstance(x, FrozenDict):
        return x.copy(changes)
    if isinstance(x, MutableMapping):
        made = copy.copy(x)
        made.update(changes)
        return made
    if isinstance(x, Mapping):
        return {**x, **changes}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        named = {k if isinstance(k, str) else x._fields[k]: v for k, v in changes.items()}  # pyright: ignore[reportAttributeAccessIssue]
        return x._replace(**named)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(x, list | tuple):
        items = list(x)
        for key, value in changes.items():
            items[key] = value
        return type(x)(items)
    if _is_dataclass(x):
        return dataclasses.replace(x, **changes)
    if hasattr(x, "at"):
        for key, value in changes.items():
            x = x.at[key].set(value)
        return x
    raise TypeError(f"a cursor cannot change a {type(x).__name__}.")


def cursor(obj: A) -> Cursor[A]:
    """A cursor at the top of `obj`.

    >>> cursor((1, 2))[0].set(3)
    (3, 2)
    """
    return Cursor(obj)
