"""What overrides say of the module whose method is running: for layers that bring names along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shardflax.core.boxes import is_box
from shardflax.core.calls import current_module
from shardflax.partitioning.overrides import call_paths, is_named
from shardflax.partitioning.rules import AxisRules, LogicalRules

__all__ = ["is_overridden", "stored_by_path"]

Names = tuple[Any, ...]


def stored_by_path(weight: Any, rules: AxisRules) -> Names | None:
    """The names that an override gives to a weight of the running module, None without one.

    The weight is found by its shape: overrides of two parameters of one shape that differ say
    nothing.  A lift that stacks parameters does so in front, so of more names the last hold.

    >>> stored_by_path(np.ones(2), AxisRules({})) is None
    True
    """
    shape = np.shape(weight)
    found = {rules.param_names(path) for path, own in _parameters(rules) if own == shape}
    names = found.pop() if len(found) == 1 else None
    return names if names is None else names[max(len(names) - len(shape), 0) :]


def is_overridden(rules: LogicalRules | None) -> bool:
    """Whether an override names a parameter of the running module, or what it returns.

    >>> is_overridden(AxisRules({}))
    False
    """
    module = current_module()
    if not isinstance(rules, AxisRules) or module is None or module.scope is None:
        return False
    if rules.activation_overrides:
        paths = call_paths("/".join((*module.path, "__call__")))
        if is_named(rules.activation_overrides, paths):
            return True
    return any(is_named(rules.param_overrides, (path,)) for path, _ in _parameters(rules))


def _parameters(rules: AxisRules) -> list[tuple[str, tuple[int, ...]]]:
    """Path and shape of each parameter of the running module itself, if that matters."""
    module = current_module()
    if not rules.param_overrides or module is None or module.scope is None:
        return []
    own = module.scope.collection("params")
    return [
        ("/".join((*module.path, name)), np.shape(_inside(value)))
        for name, value in own.items()
        if not isinstance(value, Mapping)
    ]


def _inside(value: Any) -> Any:
    """A parameter without its box, and without the constraint that opening one brings."""
    return value.value if is_box(value) and hasattr(value, "value") else value
