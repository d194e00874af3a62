"""Copies of the modules in the fields of a module."""

from __future__ import annotations

from typing import Any

from shardflax.core import holders
from shardflax.core.classes import init_field_names
from shardflax.core.cross import Crossable

__all__ = ["deep_copies", "detached", "is_module"]


def is_module(value: Any) -> bool:
    """True for a module, which the functions here do not know.

    >>> import shardflax.nn as nn
    >>> is_module(nn.Dense(2)), is_module([])
    (True, False)
    """
    return isinstance(value, Crossable)


def detached(value: Any, memo: dict[int, Any]) -> Any:
    """`value` with a copy that belongs to no run in the place of each bound module in it.

    >>> import shardflax.nn as nn
    >>> detached([nn.Dense(2).bind({})], {})[0].scope is None
    True
    """

    def detach(_: str, module: Any) -> Any:
        return module if module.scope is None else module._detached(memo)

    return holders.replace(value, is_module, detach)


def deep_copies(fields: dict[str, Any], reset_names: bool, memo: dict[int, Any]) -> dict[str, Any]:
    """`fields` with a copy of each module in them: one, for all places that share it.

    >>> import shardflax.nn as nn
    >>> layer = nn.Dense(2, name="given")
    >>> copies = deep_copies({"a": layer, "b": [layer]}, True, {})
    >>> copies["a"] is layer, copies["a"] is copies["b"][0], copies["a"].name
    (False, True, None)
    """

    def deep(_: str, module: Any) -> Any:
        if id(module) not in memo:
            names = init_field_names(module.__class__)
            inner = deep_copies({n: vars(module)[n] for n in names}, reset_names, memo)
            if reset_names:
                inner["name"] = None
            memo[id(module)] = module.clone(**inner)
        return memo[id(module)]

    return {name: holders.replace(value, is_module, deep) for name, value in fields.items()}
