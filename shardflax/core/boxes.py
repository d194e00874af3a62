"""Boxes: array leaves that carry metadata about their dims.

A *box* wraps the array of one variable and knows something about its dims (the logical name of
each, say).  The core never looks inside: when a lift takes a dim away from a collection or adds
one, it asks each box to follow, through `remove_axis` and `add_axis`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax

__all__ = [
    "AxisMetadata",
    "add_axis",
    "culprit",
    "is_box",
    "map_boxes",
    "rebox",
    "remove_axis",
    "unbox",
]


class AxisMetadata(ABC):
    """The protocol of a box: a pytree node that wraps one array and describes its dims.

    Subclasses are registered as pytree nodes and never mutated.  `shardflax.partitioning`
    provides the ones that describe sharding; any other metadata of dims follows the same four
    methods.

    >>> from shardflax.partitioning import Partitioned
    >>> isinstance(Partitioned(1.0, ()), AxisMetadata)
    True
    """

    __slots__ = ()

    @abstractmethod
    def unbox(self) -> Any:
        """The wrapped value."""

    @abstractmethod
    def replace_boxed(self, val: Any) -> Self:
        """The same box around another value."""

    @abstractmethod
    def add_axis(self, index: int, params: Mapping[Any, Any]) -> Self:
        """The box after a dim was inserted at `index` (never negative) of its value."""

    @abstractmethod
    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> Self:
        """The box after the dim at `index` (never negative) of its value was taken away."""


def is_box(x: Any) -> bool:
    """True for a box.

    >>> is_box(1.0)
    False
    """
    return _IS_BOX[type(x)]


class _ByType(dict[type, bool]):
    """What is known of each type: `isinstance` asks an abstract class in Python, per array."""

    def __missing__(self, kind: type) -> bool:
        found = self[kind] = issubclass(kind, AxisMetadata)
        return found


_IS_BOX = _ByType()


def map_boxes(fn: Callable[[AxisMetadata], Any], tree: Any) -> Any:
    """Applies `fn` to every box of `tree` and leaves other leaves alone.

    >>> map_boxes(lambda box: box.unbox(), {"a": 1.0})
    {'a': 1.0}
    """

    def visit(x: Any) -> Any:
        return fn(x) if is_box(x) else x

    return jax.tree.map(visit, tree, is_leaf=is_box)


def unbox(tree: Any) -> Any:
    """`tree` with the value of each box in the place of the box.

    >>> from shardflax.partitioning import Partitioned
    >>> unbox({"w": Partitioned(1.0, ())})
    {'w': 1.0}
    """
    return map_boxes(lambda box: unbox(box.unbox()), tree)


def rebox(tree: Any, values: Any) -> Any:
    """The boxes of `tree` around the leaves of `values`.

    `values` has the structure of `unbox(tree)`.

    >>> from shardflax.partitioning import Partitioned
    >>> rebox({"w": Partitioned(1.0, ())}, {"w": 2.0})["w"].unbox()
    2.0
    """

    def put(box: Any, value: Any) -> Any:
        return box.replace_boxed(value) if is_box(box) else value

    return jax.tree.map(put, tree, values, is_leaf=is_box)


def add_axis(tree: Any, index: int, params: Mapping[Any, Any]) -> Any:
    """Tells every box of `tree` that its value gained a dim at `index`.

    The values have it already; a negative `index` counts from their end.

    >>> from shardflax.partitioning import Partitioned
    >>> import jax.numpy as jnp
    >>> w = Partitioned(jnp.ones((4, 2, 3)), ("embed", "mlp"))
    >>> add_axis(w, 0, {"partition_name": "layers"}).names
    ('layers', 'embed', 'mlp')
    """
    return map_boxes(lambda box: box.add_axis(_dim(box, index), params), tree)


def remove_axis(tree: Any, index: int, params: Mapping[Any, Any]) -> Any:
    """Tells every box of `tree` that its value, still whole, is about to lose the dim at `index`.

    >>> from shardflax.partitioning import Partitioned
    >>> import jax.numpy as jnp
    >>> w = Partitioned(jnp.ones((4, 2)), ("layers", "embed"))
    >>> remove_axis(w, -2, {"partition_name": "layers"}).names
    ('embed',)
    """
    return map_boxes(lambda box: box.remove_axis(_dim(box, index), params), tree)


def culprit(tree: Any, change: Callable[[Any], Any]) -> tuple[str, ...]:
    """The keys of the first box of `tree` that `change` fails for, to be named in its error.

    >>> from shardflax.partitioning import Partitioned
    >>> culprit({"a": {"w": Partitioned(1.0, ())}}, lambda box: box.no_such_method())
    ('a', 'w')
    """
    tree_util: Any = jax.tree_util
    for path, box in tree_util.tree_leaves_with_path(tree, is_leaf=is_box):
        try:
            change(box)
        except Exception:
            return tuple(str(getattr(key, "key", key)) for key in path)
    return ("an unknown one",)


def _dim(box: AxisMetadata, index: int) -> int:
    """`index` counted from the front, so that no box ever sees a negative one."""
    if index >= 0:
        return index
    return index + len(jax.tree.leaves(unbox(box))[0].shape)
