"""Where a call comes from, for messages: the line of the user's code, and the module it runs in."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

from shardflax.core.calls import current_module
from shardflax.partitioning.errors import NoRulesWarning, Problem, kind_of

__all__ = ["here", "located", "warn_no_rules"]

_HERE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
_JAX = os.path.join(os.path.dirname(os.path.abspath(jax.__file__)), "")
_warned: set[tuple[str, int]] = set()


def located(problems: Sequence[Problem], what: str = "constraint") -> list[Problem]:
    """The same, with the line of code, and the module whose method runs there.

    >>> located([])
    []
    """
    if not problems:
        return []
    return [replace(problem, where=what + here()) for problem in problems]


def here() -> str:
    """The line of code, and the module whose method runs there, as an end for what is there.

    >>> here().startswith(" at ")
    True
    """
    return f" at {_caller()[0]}{_inside()}"


def _inside() -> str:
    """Where in the model this is, in brackets: a path and a class; the root has no path."""
    module = current_module()
    scope = getattr(module, "scope", None)
    if scope is None:
        return ""
    where, kind = "/".join(scope.path), kind_of(module)
    return f" (in {where}, {kind})" if where else f" (in {kind}, the outermost module)"


def _caller() -> tuple[str, tuple[str, int]]:
    """The first line outside of this package and of JAX on the stack: as text, and as a key."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith((_HERE, _JAX)):
        frame = frame.f_back
    if frame is None:
        return "an unknown line", ("", 0)
    key = (frame.f_code.co_filename, frame.f_lineno)
    return f"{key[0]}:{key[1]}", key


def warn_no_rules(names: Any) -> None:
    """Says, once for each line of code, that a constraint does nothing.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     for _ in range(2):
    ...         warn_no_rules(("batch", "act_mlp"))
    >>> len(caught)
    1
    """
    text, key = _caller()
    if key not in _warned:
        _warned.add(key)
        warnings.warn(
            f"the constraint {names!r} at {text} does nothing: no rules are in scope. Enter "
            f"`partitioning.use(mesh, rules)`; `logical_axis_rules(())` says that none are "
            f"wanted.",
            NoRulesWarning,
            stacklevel=3,
        )
