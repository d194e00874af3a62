"""Dataclasses that JAX transforms can map over.

A class made here is frozen, has a `replace` method, and is a pytree node whose fields are either
*data* (the default) or *static* (`field(pytree_node=False)`): static fields ride in the tree
structure, so they must be hashable and comparable, and a change of one makes `jax.jit` trace anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar, dataclass_transform, overload

import jax

__all__ = ["PyTreeNode", "dataclass", "field", "is_dataclass"]

_T = TypeVar("_T")
_MARK = "_shardflax_dataclass"


def field(
    pytree_node: bool = True, *, metadata: Mapping[Any, Any] | None = None, **kwargs: Any
) -> Any:
    """A dataclass field that says whether JAX looks inside it.

    `pytree_node=False` makes the field static.  Everything else is passed to `dataclasses.field`.

    >>> @dataclass
    ... class Model:
    ...     params: dict
    ...     name: str = field(pytree_node=False, default="mlp")
    >>> jax.tree.leaves(Model({"w": 1.0}))
    [1.0]
    """
    return dataclasses.field(
        metadata={**(metadata or {}), "pytree_node": pytree_node},
        **kwargs,
    )


@overload
def dataclass(clz: type[_T], **kwargs: Any) -> type[_T]: ...
@overload
def dataclass(clz: None = None, **kwargs: Any) -> Callable[[type[_T]], type[_T]]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(field, dataclasses.field))
def dataclass(clz: Any = None, **kwargs: Any) -> Any:
    """Makes a class a frozen dataclass that is a pytree node, with a `replace` method.

    `kwargs` go to `dataclasses.dataclass`, with `frozen=True` unless said otherwise.  The
    generated `__init__` must take every field, because JAX rebuilds nodes through it; put a smart
    constructor in a class method.  A class that already went through here is returned as it is.
    Raises ValueError for a field with `init=False`.

    >>> @dataclass
    ... class Point:
    ...     x: float
    ...     y: float
    >>> jax.tree.map(lambda v: v * 2, Point(1.0, 2.0)).replace(y=0.0)
    Point(x=2.0, y=0.0)
    """
    if clz is None:
        return lambda cls: dataclass(cls, **kwargs)
    if _MARK in clz.__dict__:
        return clz
    made = dataclasses.dataclass(**{"frozen": True, **kwargs})(clz)
    made.replace = _replace
    groups: dict[bool, list[str]] = {True: [], False: []}
    for f in dataclasses.fields(made):
        groups[f.metadata.get("pytree_node", True)].append(f.name)
    jax.tree_util.register_dataclass(made, groups[True], groups[False])
    setattr(made, _MARK, True)
    return made


def is_dataclass(x: Any) -> bool:
    """True for a class made by `dataclass` or `PyTreeNode`, and for its instances.

    >>> @dataclass
    ... class Point:
    ...     x: float
    >>> is_dataclass(Point), is_dataclass(Point(1.0)), is_dataclass(1.0)
    (True, True, False)
    """
    return hasattr(x, _MARK)


def _replace(self: Any, **updates: Any) -> Any:
    """A copy with some fields changed."""
    return dataclasses.replace(self, **updates)


@dataclass_transform(frozen_default=True, field_specifiers=(field, dataclasses.field))
class PyTreeNode:
    """The base class whose subclasses are dataclasses and pytree nodes, as by `dataclass`.

    Keyword arguments in the class statement go to `dataclasses.dataclass`.

    >>> class Scaled(PyTreeNode):
    ...     scale: float
    ...     fn: object = field(pytree_node=False, default=abs)
    >>> jax.tree.map(lambda s: s + 1, Scaled(2.0)).scale
    3.0
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Turns the subclass into a dataclass and registers it."""
        dataclass(cls, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Only subclasses, whose `__init__` is generated, have instances."""
        raise NotImplementedError(f"{type(self).__name__} has no fields: subclass it.")

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> Self:
            """A copy with some fields changed."""
            ...
