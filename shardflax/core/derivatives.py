"""Lifted derivatives: `vjp`, `grad`, `value_and_grad`, `jvp` and `custom_vjp`.

All but the last take derivatives while the module runs; `custom_vjp` says how others are to take
them.  State that is written inside is written as without the transform, and gets no derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import jax

from shardflax.core.boundary import Group, Groups, Lift, Pure, State
from shardflax.core.cross import cross
from shardflax.core.names import CollectionFilter, Names
from shardflax.core.staging import jx
from shardflax.core.transform_errors import NondiffArgnumsError

__all__ = ["custom_vjp", "grad", "jvp", "value_and_grad", "vjp"]

Fn = Callable[..., Any]


def _lift(
    run: Fn, chosen: CollectionFilter | Names, others: CollectionFilter, rngs: CollectionFilter
) -> Lift:
    """Collections in two groups: those that take part in a derivative, and the others."""
    ins = (Group(Names.of(chosen)), Group(Names.of(others)))
    return Lift(run, ins, ins, Names.of(rngs))


def _with_aux(fn: Fn, has_aux: bool) -> Fn:
    """`fn`, returning a pair of its result and what is no part of it."""
    return fn if has_aux else lambda *args: (fn(*args), None)


def vjp(
    fn: Fn,
    mdl: Any,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Sequence[str] = (),
    vjp_variables: CollectionFilter = "params",
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
    multi_scope: bool = False,
) -> Any:
    """`jax.vjp` of `fn(mdl, *primals)`: its result, and a function from cotangents to gradients.

    That function takes a cotangent of the result, and returns the gradients to the collections in
    `vjp_variables`, as `{collection: tree}`, and to each of `primals`.  With `has_aux`, `fn`
    returns a pair, and its second entry comes back as a third result.  `variables` and `rngs` are
    the other collections, and the streams, that `fn` sees.  With `multi_scope`, gradients are a
    list: an entry for each scope that the module needs, its own last.  `reduce_axes` is there for
    programs that pass it, and must be empty: today's JAX has no such option.

    >>> import jax.numpy as jnp, shardflax.nn as nn
    >>> class Slope(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         y, pull = nn.vjp(lambda m, x: m(x).sum(), nn.Dense(2), x)
    ...         return pull(jnp.ones(()))
    >>> (grads, dx), _ = Slope().init_with_output(jax.random.key(0), jnp.ones((1, 3)))
    >>> dx.shape
    (1, 3)
    """
    if reduce_axes:
        raise ValueError("vjp: reduce_axes must be empty; sum over named axes with jax.lax.psum.")

    def run(pure: Pure, state: State, *primals: Any) -> tuple[Any, Groups]:
        def call(chosen: Any, *primals: Any) -> Any:
            inside = State((chosen, *state.groups[1:]), state.keys)
            result, groups = pure(inside, *primals)
            y, aux = result if has_aux else (result, None)
            return y, (aux, groups)

        y, pull, (aux, groups) = jx.vjp(call, state.groups[0], *primals, has_aux=True)
        home = None if multi_scope else pure.home
        pull = jax.tree_util.Partial(_Pull(home), pull)
        return ((y, pull, aux) if has_aux else (y, pull)), groups

    return cross(_lift(run, vjp_variables, variables, rngs), (fn,), (mdl, *primals))


class _Pull:
    """From a cotangent to gradients; equal for equal roots, as it may be a residual."""

    def __init__(self, home: int | None) -> None:
        self.home = home

    def __call__(self, pull: Fn, cotangent: Any) -> tuple[Any, ...]:
        grads, *rest = pull(cotangent)
        return (list(grads) if self.home is None else grads[self.home], *rest)

    def __hash__(self) -> int:
        return hash(self.home)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pull) and self.home == other.home


def value_and_grad(
    fn: Fn,
    mdl: Any,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Sequence[str] = (),
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
) -> Any:
    """The scalar `fn(mdl, *primals)` and its gradients to `primals` (not to variables).

    The gradients are a tuple, also for one primal.  With `has_aux`, `fn` returns a pair of the
    scalar and other data, and so does this in place of the scalar.

    >>> import jax.numpy as jnp, shardflax.nn as nn
    >>> class Slope(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.value_and_grad(lambda m, x: (x**2).sum(), self, x)
    >>> y, (dx,) = Slope().apply({}, jnp.array([1.0, 2.0]))
    >>> float(y), dx.tolist()
    (5.0, [2.0, 4.0])
    """
    found = vjp(
        _with_aux(fn, has_aux),
        mdl,
        *primals,
        has_aux=True,
        reduce_axes=reduce_axes,
        vjp_variables=False,
        variables=variables,
        rngs=rngs,
    )
    y, pull, aux = found
    _, *grads = pull(jx.numpy.ones_like(y))
    return ((y, aux) if has_aux else y), tuple(grads)


def grad(fn: Fn, mdl: Any, *primals: Any, has_aux: bool = False, **options: Any) -> Any:
    """The gradients of the scalar `fn(mdl, *primals)` to `primals` (not to variables), as a tuple.

    With `has_aux`, a pair of the gradients and the other data.  For the options see
    `value_and_grad`.

    >>> import jax.numpy as jnp, shardflax.nn as nn
    >>> class Slope(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.grad(lambda m, x: (x**2).sum(), self, x)
    >>> (dx,) = Slope().apply({}, jnp.array([1.0, 2.0]))
    >>> dx.tolist()
    [2.0, 4.0]
    """
    value, grads = value_and_grad(fn, mdl, *primals, has_aux=has_aux, **options)
    return (grads, value[1]) if has_aux else grads


def jvp(
    fn: Fn,
    mdl: Any,
    primals: Sequence[Any],
    tangents: Sequence[Any],
    variable_tangents: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
) -> tuple[Any, Any]:
    """`jax.jvp` of `fn(mdl, *primals)`: its result, and the tangent of the result.

    `tangents` are those of `primals`; `variable_tangents` those of some collections, as
    `{collection: tree}`.  Other collections have no tangent.

    >>> import jax.numpy as jnp, shardflax.nn as nn
    >>> class Along(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.jvp(lambda m, x: x**2, self, (x,), (jnp.ones_like(x),), {})
    >>> y, dy = Along().apply({}, jnp.array([1.0, 2.0]))
    >>> dy.tolist()
    [2.0, 4.0]
    """
    per_scope = isinstance(variable_tangents, list | tuple)
    given = list(variable_tangents) if per_scope else [cast("Mapping[str, Any]", variable_tangents)]
    cols = Names(frozenset(col for tree in given for col in tree))

    def run(pure: Pure, state: State, *primals: Any) -> tuple[Any, Groups]:
        def call(chosen: Any, *primals: Any) -> Any:
            inside = State((chosen, *state.groups[1:]), state.keys)
            return pure(inside, *primals)

        moved = _tangents(state.groups[0], given if per_scope else {pure.home: given[0]})
        y, y_t, groups = jx.jvp(call, (state.groups[0], *primals), (moved, *tangents), has_aux=True)
        return (y, y_t), groups

    return cross(_lift(run, cols, variables, rngs), (fn,), (mdl, *primals))


def _tangents(groups: tuple[dict[str, Any], ...], given: Any) -> tuple[dict[str, Any], ...]:
    """The given tangents, and zeros for the collections of other scopes."""
    known = dict(enumerate(cast("list[Any]", given))) if isinstance(given, list) else given
    return tuple(
        {c: known[i][c] if i in known else _zeros(tree) for c, tree in cols.items()}
        for i, cols in enumerate(groups)
    )


def _zeros(tree: Any) -> Any:
    return jx.tree.map(jx.numpy.zeros_like, tree)


def custom_vjp(
    fn: Fn,
    forward_fn: Fn,
    backward_fn: Fn,
    grad_vars: CollectionFilter = "params",
    nondiff_argnums: int | Iterable[int] = (),
) -> Fn:
    """`jax.custom_vjp`: `fn(mdl, *args)` with a gradient of one's own.

    `forward_fn(mdl, *args)` returns what `fn` does, and residuals: any tree of arrays, or what
    `vjp` returned.  `backward_fn(*nondiff_args, residuals, cotangent)` returns the gradients to
    the collections in `grad_vars`, as `{collection: tree}`, and to each of the other arguments;
    it cannot use the module.  `nondiff_argnums` are positions in `fn(mdl, *args)`, so the module
    has 0: such arguments are Python values, and get no gradient.  Raises `NondiffArgnumsError` for
    a position of the module, or of no argument.

    >>> import jax.numpy as jnp, shardflax.nn as nn
    >>> class Signed(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         call = lambda mdl, x: mdl(x)
    ...
    ...         def backward(pull, y_t):
    ...             grads, *rest = pull(y_t)
    ...             return jax.tree.map(jnp.sign, grads), *rest
    ...
    ...         forward = lambda mdl, x: nn.vjp(call, mdl, x)
    ...         return nn.custom_vjp(call, forward, backward)(nn.Dense(1), x).sum()
    >>> model, x = Signed(), jnp.ones((1, 2))
    >>> grads = jax.grad(model.apply)(model.init(jax.random.key(0), x), x)
    >>> grads["params"]["Dense_0"]["kernel"].tolist()
    [[1.0], [1.0]]
    """
    static = (nondiff_argnums,) if isinstance(nondiff_argnums, int) else tuple(nondiff_argnums)

    def run(pure: Pure, state: State, *args: Any) -> tuple[Any, Groups]:
        if bad := [i for i in static if not 1 <= i <= len(args)]:
            raise NondiffArgnumsError(pure.entries[pure.home].path, bad[0], len(args))
        rule = _Rule(pure, backward_fn, static, args)
        wrapped = jx.custom_vjp(rule.call)
        wrapped.defvjp(rule.forward, rule.backward)
        free = [x for i, x in enumerate(args, 1) if i not in static]
        result = wrapped(state, *free)
        pure.traced(rule.nodes[-1])
        return result

    lift = _lift(run, grad_vars, True, True)

    def with_own_gradient(mdl: Any, *args: Any) -> Any:
        return cross(lift, (fn, forward_fn), (mdl, *args))

    vars(with_own_gradient)["child_name"] = "inner"  # as in Linen: see Scope.child
    return with_own_gradient


class _Rule:
    """The functions of one `custom_vjp`.

    JAX keeps them for as long as it keeps what it traced, so nothing of the trace outside may
    hang on them: neither scopes nor arguments, other than those that are Python values.
    """

    def __init__(self, pure: Pure, backward_fn: Fn, static: Sequence[int], args: Any) -> None:
        self.nodes: list[Any] = []
        self.pure = replace(pure, traced=self.nodes.append, ends={})
        self.backward_fn = backward_fn
        self.fixed = {i: args[i - 1] for i in sorted(static)}
        self.count = len(args)

    def _filled(self, free: Iterable[Any]) -> list[Any]:
        """All arguments: the given ones around those that are fixed."""
        items = iter(free)
        return [self.fixed[i] if i in self.fixed else next(items) for i in range(1, self.count + 1)]

    def call(self, state: State, *free: Any) -> tuple[Any, Groups]:
        return self.pure.branch(0)(state, *self._filled(free))

    def forward(self, state: State, *free: Any) -> Any:
        (y, residuals), groups = self.pure.branch(1)(state, *self._filled(free))
        return (y, groups), residuals

    def backward(self, residuals: Any, cotangent: Any) -> Any:
        """Cotangents of the state and of the arguments: `None` stands for zeros."""
        variables_t, *inputs_t = self.backward_fn(*self.fixed.values(), residuals, cotangent[0])
        chosen: list[Any] = [None] * len(self.pure.entries)
        if isinstance(variables_t, list | tuple):
            chosen[:] = cast("list[Any]", variables_t)
        else:
            chosen[self.pure.home] = variables_t
        groups: Any = (tuple(chosen), None)
        keys: Any = None
        return State(groups, keys), *inputs_t
