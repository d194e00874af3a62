"""The only corner of the library on semi-private JAX: traces, jaxprs, static nodes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex

__all__ = ["Static", "current_trace", "hoist", "jx"]

_jex: Any = jex
jx: Any = jax  # JAX as an untyped value: some of its functions are half typed


@jax.tree_util.register_static
@dataclass(frozen=True)
class Static:
    """A value that crosses a JAX transform in the tree structure, compared by equality.

    >>> jax.tree.leaves(Static(("a", 1)))
    []
    """

    value: Hashable


def current_trace() -> Any:
    """A token that is equal for two moments at the same level of JAX tracing.

    >>> current_trace() == current_trace()
    True
    >>> outside = current_trace()
    >>> _ = jax.jit(lambda x: print(current_trace() == outside))(1.0)
    False
    """
    return _jex.get_opaque_trace_state(convention="flax")


def hoist(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any
) -> tuple[Any, Callable[[Any, Any], Any], list[str]]:
    """Splits a loop body into what needs to be done once and a step.

    `body(carry, xs)` gives `(changing, invariant)`; `carry` and `xs` hold shapes (`jax.ShapeDtypeStruct`); the body is traced once.  Returns the
    invariant values, a function `step(carry, xs) -> changing`, and the paths of those leaves that
    were to be invariant and are not (the values and the step are then meaningless).
    """
    closed, (changing, invariant) = jx.make_jaxpr(body, return_shape=True)(carry, xs)
    jaxpr = closed.jaxpr
    n_changing = len(jx.tree.leaves(changing))
    varying = _reachable(jaxpr)
    inside = [eqn for eqn in jaxpr.eqns if eqn.effects or varying.intersection(eqn.outvars)]
    outside = [
        eqn for eqn in jaxpr.eqns if not eqn.effects and not varying.intersection(eqn.outvars)
    ]
    paths, treedef = jx.tree.flatten_with_path(invariant)
    invariant_vars = jaxpr.outvars[n_changing:]
    bad = [
        jx.tree_util.keystr(path)
        for (path, _), var in zip(paths, invariant_vars, strict=True)
        if isinstance(var, jex.Var) and var in varying
    ]
    if bad:
        return invariant, lambda carry, xs: changing, bad
    made = {v for eqn in outside for v in eqn.outvars}
    shared = [v for v in made if any(v in _inputs(eqn) for eqn in inside)]
    shared += [v for v in jaxpr.outvars[:n_changing] if v in made and v not in shared]
    once = _part(jaxpr, outside, jaxpr.constvars, [*invariant_vars, *shared])
    values = jx.core.eval_jaxpr(once, closed.consts)
    n = len(invariant_vars)
    rest = _part(jaxpr, inside, jaxpr.constvars, jaxpr.outvars[:n_changing])
    rest = rest.replace(
        invars=[*shared, *jaxpr.invars],
        debug_info=_debug(jaxpr, len(shared) + len(jaxpr.invars), n_changing),
    )
    tree = jx.tree.structure(changing)

    def step(carry: Any, xs: Any) -> Any:
        flat = jx.core.eval_jaxpr(rest, closed.consts, *values[n:], *jx.tree.leaves((carry, xs)))
        return jx.tree.unflatten(tree, flat)

    return jx.tree.unflatten(treedef, values[:n]), step, []


def _part(jaxpr: Any, eqns: list[Any], constvars: Any, outvars: list[Any]) -> Any:
    return jaxpr.replace(
        eqns=eqns,
        constvars=constvars,
        invars=[],
        outvars=outvars,
        debug_info=_debug(jaxpr, 0, len(outvars)),
    )


def _debug(jaxpr: Any, n_in: int, n_out: int) -> Any:
    return jaxpr.debug_info._replace(arg_names=("",) * n_in, result_paths=("",) * n_out)


def _inputs(eqn: Any) -> set[Any]:
    return {v for v in eqn.invars if isinstance(v, jex.Var)}


def _reachable(jaxpr: Any) -> set[Any]:
    """Variables of `jaxpr` that depend on its inputs; a call counts as a whole."""
    reached = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if reached.intersection(_inputs(eqn)):
            reached.update(eqn.outvars)
    return reached
