"""Boxes in two slots: one holds the value as JAX wants its children, one all metadata as a tuple.

A jitted step takes each box apart and makes a new one at each call.  Here that is one call of C
to take it apart, and two assignments to make one; comparing two trees of boxes compares tuples
that are mostly the same object.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, TypeVar

from shardflax.partitioning.untyped import jx

__all__ = ["Packed", "packed"]

C = TypeVar("C", bound="type[Packed]")


class Packed:
    """What a box keeps its fields in: see `packed`.

    >>> Packed.__slots__
    ('_children', '_meta')
    """

    __slots__ = ("_children", "_meta")
    _children: tuple[Any, ...]
    _meta: tuple[Any, ...]

    # Copies and pickles go by the names of fields: the class may be frozen, and have others.
    def __reduce__(self) -> tuple[Any, ...]:
        box: Any = self
        return _restored, (type(box), {f.name: getattr(box, f.name) for f in _fields(type(box))})


def _restored(cls: Any, values: dict[str, Any]) -> Any:
    box = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(box, name, value)
    return box


def _fields(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)


class _Value:
    """The field `value`, kept as a tuple of one."""

    def __get__(self, box: Any, owner: Any = None) -> Any:
        return self if box is None else box._children[0]

    def __set__(self, box: Any, value: Any) -> None:
        if hasattr(box, "_children"):
            raise _frozen(box)
        object.__setattr__(box, "_children", (value,))


class _Meta:
    """Another field: the entry `index` of the metadata."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __get__(self, box: Any, owner: Any = None) -> Any:
        return self if box is None else box._meta[self.index]

    def __set__(self, box: Any, value: Any) -> None:
        # Constructors come here, also those of subclasses: field after field, in order.
        meta = getattr(box, "_meta", ())
        if len(meta) != self.index:
            raise _frozen(box)
        object.__setattr__(box, "_meta", (*meta, value))


def _frozen(box: Any) -> dataclasses.FrozenInstanceError:
    kind = type(box).__name__
    return dataclasses.FrozenInstanceError(f"a {kind} is never changed: see {kind}.replace.")


def packed(cls: C) -> C:
    """Makes a frozen dataclass a box that JAX quickly takes apart and makes.

    Its first field is the only child.  It has no slots of its own, nor a `__dict__`.  Subclasses
    may be dataclasses like any others.  What keeps it frozen are its fields, each of which is set
    once: the `__setattr__` that dataclasses make for it would have each slot set by a call.

    >>> import jax
    >>> @packed
    ... @dataclasses.dataclass(frozen=True)
    ... class Length(Packed):
    ...     __slots__ = ()
    ...     value: float
    ...     unit: str
    >>> jax.tree.map(lambda x: 2 * x, Length(1.5, "m"))
    Length(value=3.0, unit='m')
    """
    first, *others = _fields(cls)
    setattr(cls, first.name, _Value())
    for index, field in enumerate(others):
        setattr(cls, field.name, _Meta(index))
    del cls.__setattr__, cls.__delattr__
    key = jx.tree_util.GetAttrKey(first.name)

    def with_key(box: Any) -> tuple[Any, Any]:
        return ((key, box._children[0]),), box._meta

    new: Any = object.__new__

    def make(meta: Any, children: Any) -> Any:
        box = new(cls)
        box._children = children
        box._meta = meta
        return box

    take = operator.attrgetter("_children", "_meta")
    jx.tree_util.register_pytree_with_keys(cls, with_key, make, take)
    return cls
