"""Variables: what `Module.variable` and `Scope.variable` return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from shardflax.core import boxes

if TYPE_CHECKING:
    from shardflax.core.scope import Scope

__all__ = ["Variable", "is_array"]


class Variable:
    """A variable of a collection, read and written through `value`.

    >>> import jax.numpy as jnp, shardflax.nn as nn
    >>> class Counter(nn.Module):
    ...     @nn.compact
    ...     def __call__(self):
    ...         count = self.variable("state", "count", lambda: 0)
    ...         count.value += 1
    ...         return count.value
    >>> Counter().apply({"state": {"count": 4}}, mutable=["state"])
    (5, {'state': {'count': 5}})
    """

    __slots__ = ("collection", "name", "scope", "unbox")

    def __init__(self, scope: Scope, collection: str, name: str, unbox: bool = True) -> None:
        self.scope = scope
        self.collection = collection
        self.name = name
        self.unbox = unbox

    @property
    def value(self) -> Any:
        """The value; without its box if the variable was made with `unbox=True`."""
        value = self.scope.get_variable(self.collection, self.name)
        return boxes.unbox(value) if self.unbox else value

    @value.setter
    def value(self, value: Any) -> None:
        old = self.scope.get_variable(self.collection, self.name)
        if self.unbox and old is not None and not is_array(old):
            value = _rebox_like(old, value)
        self.scope.put_variable(self.collection, self.name, value)

    def is_mutable(self) -> bool:
        """True if the variable may be written."""
        return self.scope.is_mutable_collection(self.collection)


def is_array(x: Any) -> bool:
    """True for an array, traced or not: no box, and no tree that may hold one.

    >>> is_array(np.zeros(2)), is_array(2.0)
    (True, False)
    """
    return isinstance(x, _ARRAYS)


_ARRAYS = (jax.Array, np.ndarray)


def _rebox_like(old: Any, value: Any) -> Any:
    """`value` in the boxes of `old`, if there are any."""
    has_box = any(boxes.is_box(x) for x in jax.tree.leaves(old, is_leaf=boxes.is_box))
    return boxes.rebox(old, value) if has_box else value
