"""The lifted transforms: each is a function of options that returns a `Lift`.

What a target may be (a module class, a method, a function of modules) is no concern of this file:
see `shardflax.core.cross`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp

from shardflax.core import staging
from shardflax.core.boundary import Group, Groups, Lift, Pure, State
from shardflax.core.calls import trace_key
from shardflax.core.names import NONE, CollectionFilter, Names
from shardflax.core.transform_errors import LoopVariantBroadcastError, TransformAxisError

__all__ = [
    "NO_AXES",
    "In",
    "Out",
    "Splits",
    "argnums",
    "axis_groups",
    "broadcast",
    "by_mutability",
    "jit",
    "scan",
    "vmap",
]


@dataclass(frozen=True)
class In:
    """An axis for variables that only go in.

    >>> In(0).axis
    0
    """

    axis: Any


@dataclass(frozen=True)
class Out:
    """An axis for variables that only come out.

    >>> Out(0).axis
    0
    """

    axis: Any


class _Broadcast:
    def __repr__(self) -> str:
        return "broadcast"


broadcast = _Broadcast()

Axes = Mapping[CollectionFilter, Any]
NO_AXES: Mapping[Any, Any] = MappingProxyType({})


def axis_groups(axes: Axes, meta: Mapping[Any, Any]) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """Groups in and out from `variable_axes`.

    >>> [group.axis for group in axis_groups({"params": 1}, {})[0]]
    [1]
    """
    _check_mapping("variable_axes", axes, "{'params': 0}, from collections to axes")
    _check_mapping("metadata_params", meta, "{'partition_name': 'layers'}")
    for axis in axes.values():
        number = axis.axis if isinstance(axis, In | Out) else axis
        if not (number is None or isinstance(number, int)):
            raise TransformAxisError(f"variable_axes: expected an axis (int), got {number!r}.")
    ins = [(f, a.axis if isinstance(a, In) else a) for f, a in axes.items() if type(a) is not Out]
    outs = [(f, a.axis if isinstance(a, Out) else a) for f, a in axes.items() if type(a) is not In]
    return tuple(Group(Names.of(f), a, meta) for f, a in ins), tuple(
        Group(Names.of(f), a, meta) for f, a in outs
    )


def _check_mapping(option: str, given: Any, example: str) -> None:
    if not isinstance(given, Mapping):
        raise TransformAxisError(f"{option}: expected a dict such as {example}; got {given!r}.")


@dataclass(frozen=True)
class Splits:
    """Which streams are split over the new dim; streams in neither set do not enter.

    >>> splits = Splits.of({"dropout": True, "params": False})
    >>> "dropout" in splits.split, "params" in splits.kept
    (True, True)
    """

    split: Names
    kept: Names

    @classmethod
    def of(cls, split_rngs: Mapping[CollectionFilter, bool]) -> Splits:
        _check_mapping("split_rngs", split_rngs, "{'params': True}, from streams to bools")
        split = kept = NONE
        for spec, flag in split_rngs.items():
            fresh = Names.of(spec) - split - kept
            split, kept = (split | fresh, kept) if flag else (split, kept | fresh)
        return cls(split, kept)

    def apply(self, keys: Any, size: int) -> tuple[Any, Any]:
        """Split keys (with a leading dim) and kept keys."""
        split = tuple(
            {s: jax.random.split(k, size) for s, k in ks.items() if s in self.split} for ks in keys
        )
        return split, tuple({s: k for s, k in ks.items() if s not in self.split} for ks in keys)

    def at(self, keys: Any, index: Any) -> tuple[dict[str, Any], ...]:
        """The keys of one iteration of a loop whose length nobody knows."""
        return tuple(
            {s: jax.random.fold_in(k, index) if s in self.split else k for s, k in ks.items()}
            for ks in keys
        )


def _merge(first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    return tuple({**a, **b} for a, b in zip(first, second, strict=True))


# --- sizes and dims


def _spread(axes: Any, tree: Any) -> list[Any]:
    """An axis for each leaf of `tree` from a prefix tree of axes."""
    out: list[Any] = []

    def put(axis: Any, subtree: Any) -> None:
        out.extend([axis] * len(staging.jx.tree.leaves(subtree)))

    if isinstance(axes, list) and isinstance(tree, tuple):
        axes = tuple(cast("list[Any]", axes))
    staging.jx.tree.map(put, axes, tree, is_leaf=_is_none)
    return out


Dim = tuple[Any, str, Any]  # an axis (`None` or `broadcast`: not mapped), what of, and the array


def _size(what: str, pure: Pure, given: int | None, dims: Iterable[Dim]) -> int:
    """The one size of all mapped dims."""
    mapped: list[tuple[int, str, tuple[int, ...]]] = [
        (a, of, jnp.shape(x)) for a, of, x in dims if a is not None and a is not broadcast
    ]
    for axis, of, shape in mapped:
        if not -len(shape) <= axis < len(shape):
            raise TransformAxisError(
                f"at {_where(pure)}: {what}: axis {axis} of {of} of shape {shape} does not exist."
            )
    sizes = {shape[axis] for axis, _, shape in mapped}
    sizes |= set() if given is None else {given}
    if len(sizes) != 1:
        found = "there is none" if not sizes else f"found {sorted(sizes)}"
        raise TransformAxisError(
            f"at {_where(pure)}: {what}: all mapped dims of arguments and variables need one size; "
            f"{found}. Give {'length' if what == 'scan' else 'axis_size'}=, or map an argument "
            f"(in_axes)."
        )
    return sizes.pop()


def _where(pure: Pure) -> str:
    return "/" + "/".join(pure.entries[pure.home].path if pure.entries else ())


def _state_dims(groups: tuple[Group, ...], trees: Groups) -> list[Dim]:
    return [
        (group.axis, f"a variable of {col!r} (variable_axes)", leaf)
        for group, per_root in zip(groups, trees, strict=True)
        for collections in per_root
        for col, tree in collections.items()
        for leaf in staging.jx.tree.leaves(tree)
    ]


def _argument_dims(axes: Iterable[Any], leaves: list[Any]) -> list[Dim]:
    return [(a, "an argument (in_axes)", x) for a, x in zip(axes, leaves, strict=True)]


def _check_places(what: str, pure: Pure, groups: Iterable[Group], made: Groups) -> None:
    """Raises unless each variable that comes out has a place for the dim that it gains."""
    for axis, of, x in _state_dims(tuple(groups), made):
        ndim = jnp.ndim(x)
        if axis is not None and not -ndim - 1 <= axis <= ndim:
            raise TransformAxisError(
                f"at {_where(pure)}: {what}: axis {axis} for the new dim of {of} of shape "
                f"{jnp.shape(x)} does not exist; expected {-ndim - 1} to {ndim}."
            )


# --- vmap


def vmap(
    variable_axes: Axes = NO_AXES,
    split_rngs: Mapping[CollectionFilter, bool] = NO_AXES,
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_size: int | None = None,
    axis_name: str | None = None,
    spmd_axis_name: Any = None,
    metadata_params: Mapping[Any, Any] = NO_AXES,
) -> Lift:
    """`jax.vmap` over some collections, streams and arguments.

    `variable_axes` gives each collection that the module sees the axis of the dim that is mapped,
    or `None` if all copies share it; `In(axis)` and `Out(axis)` are for collections that only go in
    or come out.  Streams in `split_rngs` can be drawn from: with `True` each copy draws other keys,
    with `False` the same ones.  `in_axes` are those of the arguments after the module; the other
    options are those of `jax.vmap`.  Keyword arguments of a call are not mapped.
    `metadata_params` tell boxes of the dim: `{nn.PARTITION_NAME: "layers"}` names it.

    Raises `TransformAxisError` for an axis that does not exist, or sizes that differ.

    >>> import jax.numpy as jnp, shardflax.nn as nn
    >>> stacked = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
    >>> variables = jax.eval_shape(stacked(2).init, jax.random.key(0), jnp.ones((4, 1, 3)))
    >>> variables["params"]["kernel"].shape
    (4, 3, 2)
    """
    ins, outs = axis_groups(variable_axes, metadata_params)
    splits = Splits.of(split_rngs)

    def run(pure: Pure, state: State, *args: Any, **kwargs: Any) -> tuple[Any, Groups]:
        dims = _argument_dims(_spread(in_axes, args), staging.jx.tree.leaves(args))
        size = _size("vmap", pure, axis_size, [*dims, *_state_dims(ins, state.groups)])
        split, kept = splits.apply(state.keys, size)

        def mapped(groups: Groups, split: Any, args: tuple[Any, ...]) -> tuple[Any, Groups]:
            y, made = pure(State(groups, _merge(split, kept)), *args, **kwargs)
            _check_places("vmap", pure, outs, made)
            return y, made

        return jax.vmap(
            mapped,
            in_axes=(tuple(g.axis for g in ins), 0, in_axes),
            out_axes=(out_axes, tuple(g.axis for g in outs)),
            axis_size=size,
            axis_name=axis_name,
            spmd_axis_name=spmd_axis_name,
        )(state.groups, split, args)

    return Lift(run, ins, outs, splits.split | splits.kept)


# --- scan


def scan(
    variable_axes: Axes = NO_AXES,
    variable_broadcast: CollectionFilter = False,
    variable_carry: CollectionFilter = False,
    split_rngs: Mapping[CollectionFilter, bool] = NO_AXES,
    in_axes: Any = 0,
    out_axes: Any = 0,
    length: int | None = None,
    reverse: bool = False,
    unroll: int = 1,
    data_transform: Callable[..., Any] | None = None,
    metadata_params: Mapping[Any, Any] = NO_AXES,
    _split_transpose: bool = False,
    check_constancy_invariants: bool = True,
) -> Lift:
    """`jax.lax.scan` of a body that takes a carry and returns a new one and an output.

    The body is traced once.  A collection is in `variable_axes` (an axis as in `vmap`; each step
    has a slice), `variable_broadcast` (shared by all steps; what the body makes in it is made once)
    or `variable_carry` (written by one step, read by the next); others are not seen.  `split_rngs`
    and `metadata_params` are as in `vmap`.  `in_axes` are those of the arguments after the carry,
    `out_axes` those of the output, as trees where they differ; `nn.broadcast` is for what all steps
    share.  `data_transform(groups, keys)` changes the variables and keys of each step.  `length`,
    `reverse` and `unroll` are those of `jax.lax.scan`.  `check_constancy_invariants` is there for
    programs that pass it: a body that is traced once needs no check.

    Raises `TransformAxisError` for an axis that does not exist, or sizes that differ, and
    `LoopVariantBroadcastError` for something shared that a step changes.

    >>> import jax.numpy as jnp, shardflax.nn as nn
    >>> class Layer(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, _):
    ...         return nn.relu(nn.Dense(3)(x)), None
    >>> stack = nn.scan(Layer, {"params": 0}, split_rngs={"params": True}, length=4)
    >>> variables = jax.eval_shape(stack().init, jax.random.key(0), jnp.ones((1, 3)), None)
    >>> variables["params"]["Dense_0"]["kernel"].shape
    (4, 3, 3)
    """
    fixed = (Group(Names.of(variable_broadcast)), Group(Names.of(variable_carry)))
    ins, outs = (fixed + groups for groups in axis_groups(variable_axes, metadata_params))
    if any(group.axis is None for group in (*ins[2:], *outs[2:])):
        raise TransformAxisError(
            f"scan: variable_axes={dict(variable_axes)!r} leave a collection without an axis. What "
            f"all steps share belongs in variable_broadcast, what one step hands to the next in "
            f"variable_carry."
        )
    splits = Splits.of(split_rngs)
    loop = functools.partial(
        jax.lax.scan, reverse=reverse, unroll=unroll, _split_transpose=_split_transpose
    )

    def run(pure: Pure, state: State, carry: Any, *args: Any, **kwargs: Any) -> tuple[Any, Groups]:
        axes = _spread(in_axes, args)
        leaves, treedef = staging.jx.tree.flatten(args)
        dims = [*_argument_dims(axes, leaves), *_state_dims(ins[2:], state.groups[2:])]
        size = _size("scan", pure, length, dims)
        split, kept = splits.apply(state.keys, size)
        body = _Body(pure, outs, treedef, axes, leaves, out_axes, kept, kwargs, data_transform)
        body.broadcast, carried = state.groups[0], state.groups[1]
        body.constant, carried = by_mutability(pure, carried)
        scanned = _move(state.groups[2:], [g.axis for g in ins[2:]], to_front=True)
        xs = (scanned, split, body.scanned_leaves())
        hoisted, step = _hoist(body, pure, out_axes, (carried, carry), xs)
        (carried, carry), (ys, groups) = loop(step, (carried, carry), xs, length=size)
        groups = _move(groups, [g.axis for g in outs[2:]], to_front=False)
        y = body.join_outputs(ys, hoisted[1])
        return (carry, y), (hoisted[0], carried, *groups)

    return Lift(run, ins, outs, splits.split | splits.kept)


def by_mutability(pure: Pure, group: tuple[dict[str, Any], ...]) -> tuple[Any, Any]:
    """Splits the carried collections: those that cannot change need not be carried.

    Takes and returns, for each root scope, its collections: first the constant ones.
    """
    pairs = [*zip(group, pure.entries, strict=True)]
    constant = tuple({c: t for c, t in tree.items() if c not in e.mutable} for tree, e in pairs)
    return constant, tuple({c: t for c, t in tree.items() if c in e.mutable} for tree, e in pairs)


def _move(groups: Any, axes: list[Any], to_front: bool) -> Any:
    """Moves the scanned dim of each group to the front, or from there to its place."""

    def move(axis: int) -> Callable[[Any], Any]:
        return lambda x: jnp.moveaxis(x, axis, 0) if to_front else jnp.moveaxis(x, 0, axis)

    return tuple(
        g if axis == 0 else staging.jx.tree.map(move(axis), g)
        for g, axis in zip(groups, axes, strict=True)
    )


@dataclass
class _Body:
    """The body of a scan as a function of `(carry, xs)`: `((carry, ys), (invariants))`."""

    pure: Pure
    outs: tuple[Group, ...]
    treedef: Any
    axes: list[Any]
    leaves: list[Any]
    out_axes: Any
    kept_keys: tuple[Any, ...]
    kwargs: dict[str, Any]
    data_transform: Callable[..., Any] | None
    broadcast: Any = None
    constant: Any = None
    out: Any = None  # the tree of the body's scanned output, and the axis of each leaf

    def scanned_leaves(self) -> list[Any]:
        pairs = zip(self.axes, self.leaves, strict=True)
        return [jnp.moveaxis(x, a, 0) for a, x in pairs if _is_axis(a)]

    def __call__(self, carry: Any, xs: Any) -> tuple[Any, Any]:
        (carried, carry), (scanned, split, slices) = carry, xs
        groups = (self.broadcast, _merge(self.constant, carried), *scanned)
        state = State(groups, _merge(split, self.kept_keys))
        if self.data_transform is not None:
            state = State(*self.data_transform(*state))
        items = iter(slices)
        leaves = [
            next(items) if _is_axis(a) else x for a, x in zip(self.axes, self.leaves, strict=True)
        ]
        args = staging.jx.tree.unflatten(self.treedef, leaves)
        (carry, y), out = self.pure(state, carry, *args, **self.kwargs)
        _check_places("scan", self.pure, self.outs, out)
        ys, fixed = self._split_outputs(y)
        return ((out[1], carry), (ys, out[2:])), (out[0], fixed)

    def step(self, carry: Any, xs: Any) -> Any:
        return self(carry, xs)[0]

    def _split_outputs(self, y: Any) -> tuple[list[Any], list[Any]]:
        leaves, treedef = staging.jx.tree.flatten(y)
        axes = _spread(self.out_axes, y)
        self.out = (treedef, axes)
        pairs = [*zip(axes, leaves, strict=True)]
        return [x for a, x in pairs if _is_axis(a)], [x for a, x in pairs if not _is_axis(a)]

    def join_outputs(self, ys: list[Any], fixed: list[Any]) -> Any:
        treedef, axes = self.out
        stacked, single = iter(ys), iter(fixed)
        leaves = [jnp.moveaxis(next(stacked), 0, a) if _is_axis(a) else next(single) for a in axes]
        return staging.jx.tree.unflatten(treedef, leaves)


def _is_axis(axis: Any) -> bool:
    return axis is not None and axis is not broadcast


def _hoist(body: _Body, pure: Pure, out_axes: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    """What the loop computes only once, and its step.

    An ordinary layer stack has nothing of the kind, and its body is not staged beforehand.
    """
    writes = any(
        any(c in e.mutable for c in cols) or (e.mutable & pure.outs[0])
        for cols, e in zip(body.broadcast, pure.entries, strict=True)
    )
    fixed_output = any(not _is_axis(a) for a in staging.jx.tree.leaves(out_axes, is_leaf=_is_none))
    if not writes and not fixed_output:
        nothing: Any = tuple(dict[str, Any]() for _ in pure.entries), []
        return nothing, body.step

    abstract = staging.jx.tree.map(_abstract, (carry, staging.jx.tree.map(_first, xs)))
    invariant, step, varying = staging.hoist(body, *abstract)
    if varying:
        raise LoopVariantBroadcastError([_invariant_at(pure, path) for path in varying])
    return invariant, step


def _invariant_at(pure: Pure, path: Any) -> str:
    """What lies at `path` in the invariants of a body: a variable, or an output."""
    kind, place, *inside = staging.jx.tree_util.keystr(path, simple=True, separator="/").split("/")
    if kind == "1":
        return f"output {place}"
    col, *names = inside
    return "/".join((col, *pure.entries[int(place)].path, *names))


def _is_none(x: Any) -> bool:
    return x is None or x is broadcast


def _first(x: Any) -> Any:
    return staging.jx.eval_shape(lambda: x[0])


def _abstract(x: Any) -> Any:
    return staging.jx.eval_shape(lambda: x)


# --- jit


def jit(
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
    donate_argnums: int | Iterable[int] = (),
    device: Any = None,
    backend: str | None = None,
) -> Lift:
    """`jax.jit`; what tracing did on the Python side is kept, and repeated on cache hits.

    `variables` and `rngs` are the collections and streams that the module sees.  Positions in
    `static_argnums` and `donate_argnums` count the module as 0; to donate that is to donate its
    variables.  Calls of equal modules share one compilation, as long as they are of one lifted
    class or function: lift outside of loops.

    >>> import jax.numpy as jnp, shardflax.nn as nn
    >>> model = nn.jit(nn.Dense)(2)
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 3)))[0].shape
    (1, 2)
    """

    # The pure function rides in the tree structure, so equal calls share one compilation; the
    # nodes come back in the tree structure too, so a cache hit brings them as tracing did.
    def entry(static: staging.Static, state: State, *args: Any, **kwargs: Any) -> Any:
        nodes: list[Any] = []
        pure = replace(cast("tuple[Pure, Any]", static.value)[0], traced=nodes.append)
        result = pure(state, *args, **kwargs)
        return result, staging.Static(nodes[-1])

    options = {"device": device, "backend": backend}
    jitted = staging.jx.jit(
        entry,
        static_argnums=argnums(static_argnums, before=1),
        static_argnames=static_argnames or None,
        donate_argnums=argnums(donate_argnums, before=1),
        **{name: value for name, value in options.items() if value is not None},
    )

    def run(pure: Pure, state: State, *args: Any, **kwargs: Any) -> tuple[Any, Groups]:
        # The compilation outlives this call: it must not keep the scopes outside alive.
        key = staging.Static((replace(pure, traced=_ignore), trace_key()))
        result, nodes = jitted(key, state, *args, **kwargs)
        pure.traced(nodes.value)
        return result

    return Lift.whole(run, variables, rngs, rekey=True)


def _ignore(nodes: Any) -> None:
    """Stands for `Pure.traced` where nobody waits for it."""


def argnums(given: int | Iterable[int], before: int) -> tuple[int, ...]:
    """Users' positions of arguments, as positions in a call of a transformed pure function.

    Users count the module as argument 0.  There, the state stands in its place, after `before`
    arguments of ours.

    >>> argnums([1, -1], before=1)
    (2, -1)
    """
    nums = (given,) if isinstance(given, int) else tuple(given)
    return tuple(n + before if n >= 0 else n for n in nums)
