"""Shapes of a parameter, as its initializer gives them and as they are stored."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any, cast

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

    It is called on abstract values, and only the first time for hashable arguments: but each time
    if it holds values of its own, which the cache would keep alive.

    >>> shapes_of(jax.nn.initializers.zeros, ((2, 3),), {})
    [(2, 3)]
    """
    if not _may_stay(init_fn):
        return _made(init_fn, args, kwargs)
    try:
        return _cached(init_fn, args, tuple(sorted(kwargs.items())))
    except TypeError:  # something in the call is not hashable
        return _made(init_fn, args, kwargs)


def _may_stay(x: Any, depth: int = 4) -> bool:
    """True for what holds neither arrays nor modules: a `lambda` in a method often has both."""
    if isinstance(x, _SMALL):
        return True
    parts: Iterable[Any] = ()
    if isinstance(x, FunctionType):
        cells = (cell.cell_contents for cell in x.__closure__ or ())
        parts = (*cells, *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values())
    elif isinstance(x, functools.partial):
        partial: Any = cast("Any", x)
        parts = (partial.func, *partial.args, *partial.keywords.values())
    elif isinstance(x, tuple | frozenset):
        parts = cast("Iterable[Any]", x)
    elif dataclasses.is_dataclass(x) and not hasattr(x, "scope"):
        fields = {f.name: getattr(x, f.name, None) for f in dataclasses.fields(x)}
        parts = {**fields, **getattr(x, "__dict__", {})}.values()  # there is none with slots
    else:
        return False
    return depth > 0 and all(_may_stay(part, depth - 1) for part in parts)


_SMALL = (int, float, complex, str, bytes, type, type(None), np.dtype, np.generic)


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
