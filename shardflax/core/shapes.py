"""Shapes of a parameter, as its initializer gives them and as they are stored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from shardflax.core import boxes
from shardflax.core.staging import jx

__all__ = ["shapes_of", "stored_shapes"]

Shapes = list[tuple[int, ...]]


def stored_shapes(value: Any) -> Shapes:
    """The shapes of the arrays that a stored parameter, in boxes or not, is made of.

    >>> stored_shapes({"a": np.ones((2, 3)), "b": 1.0})
    [(2, 3), ()]
    """
    return [np.shape(leaf) for leaf in jx.tree.leaves(boxes.unbox(value))]


def shapes_of(
    init_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Shapes:
    """The shapes of what `init_fn(key, *args, **kwargs)` would make.

    It is called on abstract values, and only the first time for hashable arguments.

    >>> shapes_of(jax.nn.initializers.zeros, ((2, 3),), {})
    [(2, 3)]
    """
    try:
        return _cached(init_fn, args, tuple(sorted(kwargs.items())))
    except TypeError:  # something in the call is not hashable
        return _made(init_fn, args, kwargs)


@functools.lru_cache(maxsize=4096)
def _cached(
    init_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]
) -> Shapes:
    return _made(init_fn, args, dict(kwargs))


def _made(init_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shapes:
    def init(key: Any) -> Any:
        return init_fn(key, *args, **kwargs)

    tree = jx.eval_shape(init, jx.eval_shape(lambda: jax.random.key(0)))
    return [leaf.shape for leaf in jx.tree.leaves(boxes.unbox(tree))]
