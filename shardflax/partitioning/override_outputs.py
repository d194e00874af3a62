"""Layouts for what methods of modules return, by path: `AxisRules.with_overrides(activations=)`.

`use` and `logical_axis_rules` put `lay_out` into the core's chain of interceptors while rules with
such overrides are in scope.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import jax
import numpy as np

from shardflax.core.calls import InterceptorContext, context, intercept_methods
from shardflax.core.errors import did_you_mean
from shardflax.core.module import Module
from shardflax.partitioning.errors import OverrideError, Problem, raise_problems
from shardflax.partitioning.lowering import lower
from shardflax.partitioning.overrides import unmatched
from shardflax.partitioning.resolve import resolve
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.scope import (
    InitTrace,
    free_axes,
    init_trace,
    mesh_in_scope,
    rules_in_scope,
)

__all__ = ["install", "installed", "lay_out", "unmatched_outputs"]


def installed(rules: LogicalRules | None) -> contextlib.AbstractContextManager[None]:
    """A context in which `lay_out` sees every call, if `rules` have something for it to do.

    >>> from shardflax.core.calls import context
    >>> with installed(AxisRules({}).with_overrides(activations={"up": ("batch", None)})):
    ...     lay_out in context.interceptors
    True
    """
    return intercept_methods(lay_out) if _is_missing(rules) else contextlib.nullcontext()


def install(rules: LogicalRules | None) -> None:
    """The same for good: without such rules in scope `lay_out` passes everything through.

    >>> install(AxisRules({}))
    """
    if _is_missing(rules):
        context.interceptors.insert(0, lay_out)


def _is_missing(rules: LogicalRules | None) -> bool:
    """True where `lay_out` is needed and is not there yet."""
    wanted = isinstance(rules, AxisRules) and bool(rules.activation_overrides)
    return wanted and lay_out not in context.interceptors


def lay_out(next_fun: Callable[..., Any], args: Any, kwargs: Any, told: InterceptorContext) -> Any:
    """An interceptor: constrains what a method returns, if the rules in scope have names for it.

    Raises a `LayoutError` with the path of the method: for two overrides that differ, for names
    that do not fit what it returns, the rules, or the mesh.

    >>> import jax.numpy as jnp, shardflax.nn as nn
    >>> from shardflax.partitioning import make_mesh, use
    >>> rules = AxisRules({"rows": "data"}).with_overrides(activations={"__call__": ("rows", None)})
    >>> model, x = nn.Dense(2, use_bias=False), jnp.ones((8, 3))
    >>> with use(make_mesh("data=8"), rules):
    ...     y = model.apply({"params": {"kernel": jnp.ones((3, 2))}}, x)
    >>> y.sharding.spec
    P('data',)
    """
    y, rules = next_fun(*args, **kwargs), rules_in_scope()
    if not isinstance(rules, AxisRules) or told.method_name == "setup":
        return y
    if not rules.activation_overrides or told.module.scope is None:
        return y
    module, trace = "/".join(told.module.path), init_trace()
    where = f"{module}/{told.method_name}".lstrip("/")
    if trace is not None:
        trace.calls.update(_paths(module, told.module.__class__))
    try:
        return _laid_out(y, rules.activation_names(where), where, rules)
    except OverrideError as error:
        if trace is None:
            raise
        trace.problems.append(Problem(OverrideError, str(error)))
        return y


def _laid_out(y: Any, names: Any, where: str, rules: AxisRules) -> Any:
    """`y` with a constraint on each array that `names` name."""
    if names is None or y is None:
        return y
    if names[:1] == ("keys",):
        return _each_key(y, dict(names[1]), where, rules)
    if names[:1] != ("each",):
        return _constrained(y, names, where, rules.compute)
    parts = cast(Sequence[Any], names[1:])
    if not _is_sequence(y) or len(y) != len(parts):
        count = f" of {len(y)}" if _is_sequence(y) else ""
        raise OverrideError(
            f"what {where} returns: expected a tuple of {len(parts)}, for which an override has "
            f"names, found {type(y).__name__}{count}."
        )
    done = [_laid_out(part, n, where, rules) for part, n in zip(y, parts, strict=True)]
    return type(y)(*done) if hasattr(y, "_fields") else type(y)(done)


def _each_key(y: Any, names: Mapping[str, Any], where: str, rules: AxisRules) -> Any:
    """A dict with a constraint on each array whose key has names."""
    if not isinstance(y, Mapping):
        raise OverrideError(
            f"what {where} returns: expected a dict with {', '.join(map(repr, names))}, for which "
            f"an override has names, found {type(y).__name__}."
        )
    found = dict(cast(Mapping[str, Any], y))
    for key, said in names.items():
        if key not in found:
            raise OverrideError(
                f"what {where} returns: no key {key!r}, for which an override has names: "
                f"{did_you_mean(key, map(str, found))}"
            )
        found[key] = _laid_out(found[key], said, f"{where} under {key!r}", rules)
    return cast(Any, type(cast(Any, y)))(found)


def _constrained(x: Any, names: tuple[Any, ...], where: str, rules: AxisRules) -> Any:
    """One array with its constraint; while an init is traced, checked alone."""
    if not _is_array(x):
        raise OverrideError(
            f"what {where} returns: expected one array, for which an override has the names "
            f"{names!r}, found {type(x).__name__}. For a tuple, write a list of names; for a dict, "
            f"a dict of them."
        )
    trace, shape = init_trace(), tuple(np.shape(x))
    mesh = mesh_in_scope() if trace is None else None
    found = resolve(names, rules, shape, None if mesh is None else free_axes(mesh))
    problems = [replace(p, where=f"what {where} returns") for p in found.problems]
    if trace is not None:
        trace.names.update(name for name in names if isinstance(name, str))
        trace.problems.extend(problems)
        return x
    raise_problems(problems)
    return x if mesh is None else lower(x, found.spec, mesh)


def _is_sequence(x: Any) -> bool:
    return isinstance(x, (tuple, list))


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


@functools.lru_cache(maxsize=4096)
def _paths(module: str, cls: type) -> frozenset[str]:
    """Every path that an override could mean by this module: itself, and its methods."""
    own = set(dir(cls)) - set(dir(Module)) - set(getattr(cls, "__dataclass_fields__", ()))
    methods = ["__call__", *(m for m in own if m[:1] != "_" and callable(getattr(cls, m)))]
    return frozenset((module, *(f"{module}/{m}".lstrip("/") for m in methods)))


def unmatched_outputs(rules: LogicalRules, trace: InitTrace) -> tuple[Problem, ...]:
    """A problem for each override that matches no module of those that an init has called.

    >>> unmatched_outputs(AxisRules({}), InitTrace())
    ()
    """
    if not isinstance(rules, AxisRules) or not trace.calls:
        return ()
    return unmatched(rules.activation_overrides, trace.calls, "activations")
