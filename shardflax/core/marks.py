"""Marks on the methods of a module: what may happen in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["compact", "compact_name_scope", "nowrap"]

F = TypeVar("F", bound=Callable[..., Any])


def compact(fun: F) -> F:
    """Marks the method of a module that may make its submodules where they are used.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> class MLP(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.Dense(2)(nn.relu(nn.Dense(4)(x)))
    >>> sorted(MLP().init(jax.random.key(0), jnp.ones((1, 3)))["params"])
    ['Dense_0', 'Dense_1']
    """
    fun.compact = True  # pyright: ignore[reportFunctionMemberAccess]
    return fun


def compact_name_scope(fun: F) -> F:
    """Marks a method that makes submodules where they are used, in a scope named after it.

    Unlike `compact`, several methods of a class may be marked.  Variables belong to the module
    itself, not to the scope.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> class Auto(nn.Module):
    ...     @nn.compact_name_scope
    ...     def encode(self, x):
    ...         return nn.Dense(2)(x)
    ...
    ...     @nn.compact_name_scope
    ...     def decode(self, x):
    ...         return nn.Dense(3)(x)
    ...
    ...     def __call__(self, x):
    ...         return self.decode(self.encode(x))
    >>> params = Auto().init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> sorted(params), sorted(params["encode"])
    (['decode', 'encode'], ['Dense_0'])
    """
    fun.compact_name_scope = True  # pyright: ignore[reportFunctionMemberAccess]
    return fun


def nowrap(fun: F) -> F:
    """Marks a method that needs nothing of what happens around calls of a module's methods.

    >>> import shardflax.nn as nn
    >>> class Scaled(nn.Module):
    ...     width: int
    ...
    ...     @nn.nowrap
    ...     def double(self):
    ...         return 2 * self.width
    >>> Scaled(3).double()
    6
    """
    fun.nowrap = True  # pyright: ignore[reportFunctionMemberAccess]
    return fun
