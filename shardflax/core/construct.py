"""How modules are made: the `__init__` of their dataclass, with one write in place of many calls.

A dataclass assigns its fields one by one, and each assignment calls `Module.__setattr__`, which
has nothing to say yet: nothing is frozen before `__post_init__`.  In a large model these are most
of the calls that making modules takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

__all__ = ["direct_init"]


def direct_init(cls: Any, assigning: Callable[..., Any] | None) -> Callable[..., None]:
    """The `__init__` of a dataclass as one that writes fields into the instance's `__dict__`.

    It is `cls.__init__` itself where that could be told apart: where it was written by hand, where
    `__setattr__` is not `assigning` or a field is a data descriptor, where a field is no argument
    or made by a factory.  Instances of subclasses, which come by `super().__init__`, are made as
    before too.

    >>> @dataclasses.dataclass
    ... class Point:
    ...     x: int
    ...     y: int = 0
    ...
    ...     def __post_init__(self):
    ...         self.sum = self.x + self.y
    >>> Point.__init__ = direct_init(Point, object.__setattr__)
    >>> vars(Point(2, y=3))
    {'x': 2, 'y': 3, 'sum': 5}
    """
    made: FunctionType = cls.__init__
    code = made.__code__
    me, *names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if cls.__setattr__ is not assigning or not _plain(cls, names):
        return made
    positional, keywords = names[: code.co_argcount - 1], names[code.co_argcount - 1 :]
    given = ", ".join((me, *positional, *(f"{name}={name}" for name in keywords)))
    lines = [
        f"def __init__({', '.join((me, *positional, *('*' for _ in keywords[:1]), *keywords))}):",
        f"    if {me}.__class__ is not {_CLASS}:",
        f"        return {_MADE}({given})",
        f"    {_ATTRS} = {me}.__dict__",
        *(f"    {_ATTRS}[{name!r}] = {name}" for name in names),
        f"    {me}.__post_init__()",
    ]
    space: dict[str, Any] = {_CLASS: cls, _MADE: made}
    exec("\n".join(lines), space)
    direct = space["__init__"]
    direct.__defaults__, direct.__kwdefaults__ = made.__defaults__, made.__kwdefaults__
    direct.__annotations__ = made.__annotations__
    direct.__qualname__, direct.__module__ = made.__qualname__, cls.__module__
    return direct


# No names of fields.
_CLASS, _MADE, _ATTRS = "__class_of_init__", "__init_of_dataclass__", "__dict_of_instance__"


def _plain(cls: Any, names: list[str]) -> bool:
    """True if all that `__init__` does is to assign its arguments, each to its field."""
    fields = dataclasses.fields(cls)
    assigned = {f.name for f in fields if f.default_factory is dataclasses.MISSING}
    if len(fields) != len(names) or assigned != {*names}:
        return False
    places: list[Mapping[str, Any]] = [vars(c) for c in cls.__mro__]
    return not any(hasattr(place.get(name), "__set__") for place in places for name in names)
