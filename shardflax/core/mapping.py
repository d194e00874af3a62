"""Lifts that change what a module sees of its variables and keys, and stacks of layers.

Like those of `shardflax.core.transforms`, each is a function of options that returns a `Lift`
(or several, the outermost first).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

from shardflax.core.boundary import Group, Groups, Lift, Pure, State
from shardflax.core.names import ALL, NONE, CollectionFilter, Names
from shardflax.core.remat import remat
from shardflax.core.transform_errors import TransformAxisError
from shardflax.core.transforms import NO_AXES, axis_groups, by_mutability, scan

__all__ = [
    "add_metadata_axis",
    "fold_rngs",
    "map_scope_variables",
    "map_variables",
    "remat_scan",
]

_ALL_AXES: Mapping[CollectionFilter, Any] = MappingProxyType({True: 0})
_ALL_SPLIT: Mapping[CollectionFilter, bool] = MappingProxyType({True: True})


def _same(tree: Any) -> Any:
    return tree


def map_variables(
    mapped_collections: CollectionFilter = True,
    trans_in_fn: Callable[..., Any] = _same,
    trans_out_fn: Callable[..., Any] = _same,
    init: bool = False,
    mutable: bool = False,
    rngs: CollectionFilter = True,
    variables: CollectionFilter = True,
) -> Lift:
    """Shows a module some collections as `trans_in_fn({collection: tree})` gives them.

    What the module writes to them comes out through `trans_out_fn`: with `mutable` always; with
    `init` after a first run that makes the variables, if they may change.  With neither, the
    mapped collections are read only inside.  `variables` and `rngs` are the other collections, and
    the streams, that the module sees.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> class Causal(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         triu = lambda tree: jax.tree.map(jnp.triu, tree)
    ...         init = self.is_initializing()
    ...         layer = nn.map_variables(nn.Dense, "params", triu, init=init)
    ...         return layer(3, use_bias=False)(x)
    >>> y, variables = Causal().init_with_output(jax.random.key(0), jnp.eye(3))
    >>> float(y[2, 0]), float(y[0, 2]) != 0
    (0.0, True)
    """
    mapped, writes = Names.of(mapped_collections), init or mutable
    ins = Group(mapped), Group(Names.of(variables))
    outs = Group(mapped if writes else NONE), Group(Names.of(variables) - mapped)

    def run(pure: Pure, state: State, *args: Any, **kwargs: Any) -> tuple[Any, Groups]:
        target, others = state.groups
        if init and any(entry.mutable & mapped for entry in pure.entries):
            made = pure(state, *args, **kwargs)[1][0]
            kept = by_mutability(pure, target)[0]
            target = tuple(
                {**k, **_through(trans_out_fn, m)} for k, m in zip(kept, made, strict=True)
            )
        inside = tuple(trans_in_fn(tree) for tree in target)
        then = pure.branch(0, turn=1)
        y, (changed, rest) = then(State((inside, others), state.keys), *args, **kwargs)
        return y, (tuple(_through(trans_out_fn, tree) for tree in changed), rest)

    return Lift(run, ins, outs, Names.of(rngs))


def map_scope_variables(
    mapped_collections: CollectionFilter = True,
    map_in_fn: Callable[..., Any] = _same,
    map_out_fn: Callable[..., Any] = _same,
    init: bool = False,
    mutable: bool = False,
    rngs: CollectionFilter = True,
    variables: CollectionFilter = True,
) -> Lift:
    """`map_variables` with the names that its parameters have for functions of scopes.

    >>> import jax
    >>> from shardflax.core import apply, lift
    >>> def weight(scope):
    ...     return scope.param("w", lambda key: 0.0)
    >>> half = lift.map_variables(
    ...     weight, "params", map_in_fn=lambda tree: jax.tree.map(lambda w: w / 2, tree)
    ... )
    >>> apply(half)({"params": {"w": 6.0}})
    3.0
    """
    return map_variables(mapped_collections, map_in_fn, map_out_fn, init, mutable, rngs, variables)


def _through(fn: Callable[..., Any], collections: dict[str, Any]) -> dict[str, Any]:
    """What `fn` makes of collections; nothing of nothing."""
    return dict(fn(collections)) if collections else {}


def add_metadata_axis(
    variable_axes: Mapping[CollectionFilter, Any] = NO_AXES,
    metadata_params: Mapping[Any, Any] = NO_AXES,
) -> Lift:
    """Tells boxes of a dim that something other than a lift adds to the variables inside.

    Boxes come out with the dim at `variable_axes` that `metadata_params` name, and go in without
    it; values stay as they are.  Raises `TransformAxisError` for a negative axis: the values do not
    have the dim, so there is no end to count from.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> init = nn.with_partitioning(nn.initializers.ones, ("embed", "mlp"))
    >>> stacked = nn.add_metadata_axis(nn.Dense, {"params": 0}, {nn.PARTITION_NAME: "layers"})
    >>> variables = stacked(2, kernel_init=init, use_bias=False).init(
    ...     jax.random.key(0), jnp.ones((1, 3))
    ... )
    >>> variables["params"]["kernel"].names
    ('layers', 'embed', 'mlp')
    """

    ins, outs = axis_groups(variable_axes, metadata_params)
    for group in (*ins, *outs):
        if group.axis is not None and group.axis < 0:
            raise TransformAxisError(
                f"add_metadata_axis: axis {group.axis} is negative, and values do not have the dim "
                f"that is added; count it from the front."
            )
    others = (Group(ALL),)
    return Lift(_call, ins + others, outs + others)


def _call(pure: Pure, state: State, *args: Any, **kwargs: Any) -> tuple[Any, Groups]:
    """The `run` of a lift that only changes what comes in or out."""
    return pure(state, *args, **kwargs)


def fold_rngs(variables: CollectionFilter = True, rngs: CollectionFilter = True) -> Lift:
    """Draws one key of each stream at each call, and gives the module those as its streams.

    Keys inside depend on that key and on the path below this module.  `variables` and `rngs` are
    the collections and streams that the module sees.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> variables = nn.fold_rngs(nn.Dense)(2).init(jax.random.key(0), jnp.ones((1, 3)))
    >>> variables["params"]["kernel"].shape
    (3, 2)
    """
    return Lift.whole(_call, variables, rngs, rekey=True)


def remat_scan(
    lengths: Sequence[int] = (),
    policy: Any = None,
    variable_broadcast: CollectionFilter = False,
    variable_carry: CollectionFilter = False,
    variable_axes: Mapping[CollectionFilter, Any] = _ALL_AXES,
    split_rngs: Mapping[CollectionFilter, bool] = _ALL_SPLIT,
    metadata_params: Mapping[Any, Any] | Sequence[Mapping[Any, Any]] = NO_AXES,
) -> tuple[Lift, ...]:
    """Repeats a module `prod(lengths)` times, in nested scans whose bodies are rematerialised.

    The module takes one argument, and returns its like.  Memory for the backward pass grows with
    the sum of `lengths`, not with their product.  Variables gain a leading dim a level;
    `metadata_params` describe each to the boxes, outermost first (one mapping, for one level).

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> deep = nn.remat_scan(nn.Dense, lengths=(2, 3))(4)
    >>> variables = deep.init(jax.random.key(0), jnp.ones((1, 4)))
    >>> variables["params"]["kernel"].shape
    (2, 3, 4, 4)
    """
    if not lengths:
        raise TransformAxisError("remat_scan: lengths are missing: one for each level, as (4, 3).")
    single = isinstance(metadata_params, Mapping)
    metas: Any = [metadata_params] * len(lengths) if single else metadata_params
    if not isinstance(metas, Sequence) or len(cast("Sequence[Any]", metas)) != len(lengths):
        raise TransformAxisError(
            f"remat_scan: lengths={tuple(lengths)} are {len(lengths)} levels, and metadata_params "
            f"are {metadata_params!r}. Give a list with one mapping a level, the outermost first, "
            f"or a single mapping for all."
        )
    lifts: list[Lift] = []
    for length, meta in zip(lengths, cast("list[Mapping[Any, Any]]", metas), strict=True):
        options: dict[str, Any] = {
            "variable_broadcast": variable_broadcast,
            "variable_carry": variable_carry,
            "variable_axes": variable_axes,
            "split_rngs": split_rngs,
        }
        loop = scan(length=length, metadata_params=meta, **options)
        lifts += [replace(loop, run=_CarryAlone(loop.run)), remat(policy=policy, prevent_cse=False)]
    return tuple(lifts)


@dataclass(frozen=True)
class _CarryAlone:
    """The `run` of a scan whose body has a carry, and nothing else comes in or out."""

    run: Callable[..., Any]

    def __call__(self, pure: Pure, state: State, carry: Any) -> tuple[Any, Groups]:
        body = replace(pure, fns=(_NoOutput(pure.fns[0]),))
        (carry, _), groups = self.run(body, state, carry)
        return carry, groups


@dataclass(frozen=True)
class _NoOutput:
    fn: Callable[..., Any]

    def __call__(self, scopes: Any, carry: Any) -> tuple[Any, None]:
        return self.fn(scopes, carry), None
