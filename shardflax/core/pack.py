"""`pack`: a lift written as one function, for functions of scopes.

This is the general form that Linen documents.  `shardflax.core.lifted` takes a `Lift`, which says
the same in less, and serves modules too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from shardflax.core.boundary import Group, Groups, Lift, Pure, State
from shardflax.core.cross import cross
from shardflax.core.names import NONE, CollectionFilter, Names
from shardflax.core.scope import Scope, Store
from shardflax.core.staging import jx

__all__ = ["pack", "tree_map_rngs"]


def pack(
    fn: Callable[..., tuple[Any, Any]],
    in_variable_filters: Sequence[CollectionFilter],
    out_variable_filters: Sequence[CollectionFilter],
    rng_filters: Sequence[CollectionFilter],
    name: str | None = None,
    enable_kwargs: bool = False,
) -> Callable[..., Any]:
    """A function of a scope (or a tree of scopes) from `fn`, which gets its state as trees.

    `fn(scope_fn, repack_fn, variable_groups, rng_groups, *args)` returns a result and the groups
    that come out.  A group is a tuple with a dict a root scope: `{collection: tree}`, or
    `{stream: key}`; which names belong to which group is what the filters say, the first match
    counts.  `scope_fn(variable_groups, rng_groups)` makes scopes, `repack_fn(scopes)` the groups of
    what was written in them.  With `enable_kwargs`, `fn` gets keyword arguments too.

    >>> import jax.numpy as jnp
    >>> from shardflax.core import apply, nn
    >>> def transposed(scope_fn, repack_fn, variable_groups, rng_groups, *args):
    ...     scope = scope_fn(jax.tree.map(jnp.transpose, variable_groups), rng_groups)
    ...     return nn.dense(scope, *args, bias=False), repack_fn(scope)
    >>> dense = pack(transposed, ["params"], ["params"], [True])
    >>> variables = {"params": {"kernel": jnp.ones((4, 3))}}
    >>> apply(dense)(variables, jnp.ones((2, 3)), 4).shape
    (2, 4)
    """
    ins = tuple(Group(Names.of(f)) for f in in_variable_filters)
    outs = tuple(Group(Names.of(f)) for f in out_variable_filters)
    streams = [Names.of(f) for f in rng_filters]
    allowed = NONE
    for names in streams:
        allowed = allowed | names

    @functools.wraps(fn)
    def packed(scopes: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs and not enable_kwargs:
            raise TypeError(
                f"{name or 'pack'}: got the keyword arguments {sorted(kwargs)}; write "
                f"pack(..., enable_kwargs=True) to pass them on."
            )

        def run(pure: Pure, state: State) -> tuple[Any, Groups]:
            inside = _Inside(pure)
            groups = _by_stream(state.keys, streams)
            return fn(inside.scopes, inside.repack, state.groups, groups, *args, **kwargs)

        return cross(Lift(run, ins, outs, allowed), [_itself], (scopes,))

    return packed


def _itself(scopes: Any) -> Any:
    return scopes


def _is_scope(x: Any) -> bool:
    return isinstance(x, Scope)


def _by_stream(keys: tuple[dict[str, Any], ...], groups: Sequence[Names]) -> list[Any]:
    """The keys in groups, the first match counts."""
    found: list[Any] = []
    seen = NONE
    for names in groups:
        fresh = names - seen
        seen = seen | names
        found.append(tuple({s: k for s, k in per.items() if s in fresh} for per in keys))
    return found


class _Inside:
    """Opens and closes the scopes of one boundary, on behalf of `fn`."""

    def __init__(self, pure: Pure) -> None:
        self.pure = pure
        self.opened: dict[Store, list[Scope]] = {}

    def scopes(self, variable_groups: Any, rng_groups: Any) -> Any:
        keys = tuple(
            {s: k for group in rng_groups for s, k in group[i].items()}
            for i in range(len(self.pure.entries))
        )
        roots = self.pure.open(State(tuple(variable_groups), keys))
        self.opened |= {root.store: roots for root in roots}
        return self.pure.fns[0](roots)

    def repack(self, scopes: Any) -> Groups:
        one = jx.tree.leaves(scopes, is_leaf=_is_scope)[0]
        return self.pure.close(self.opened[one.store])


def tree_map_rngs(fn: Callable[[jax.Array], Any], tree: Any) -> Any:
    """Applies `fn` to each key of the RNG groups of `pack`.

    >>> keys = ({"params": jax.random.key(0)},)
    >>> tree_map_rngs(lambda key: jax.random.split(key, 2), keys)[0]["params"].shape
    (2,)
    """
    return jx.tree.map(fn, tree)
