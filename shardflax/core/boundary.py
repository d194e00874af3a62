"""Lifting: take state out of its trace, run pure functions of it, put it back.

A JAX transform wants pure functions of pytrees; a module reads and writes the state of its run.
A `Boundary` joins the two.  It *takes* the variables and keys of some scopes out as a pytree; a
`Lift` runs a pure function of that tree under a JAX transform; inside, the boundary *opens* the
tree as new scopes and afterwards *closes* them into a tree again; at last it *publishes* what came
out into the scopes outside.

Collections that travel together form a `Group`.  If a group loses a dim on the way in, it gains
the dim on the way out, and the boxes of its variables are told so here and nowhere else: every
transform, those written later included, has right axis metadata for free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax

from shardflax.core import boxes
from shardflax.core.frozen_dict import unfreeze
from shardflax.core.names import ALL, NONE, CollectionFilter, Names
from shardflax.core.node import Frozen, Node
from shardflax.core.rng import Stream
from shardflax.core.scope import Scope, Store

__all__ = ["Boundary", "Entry", "Group", "Lift", "Pure", "State"]

Groups = tuple[tuple[dict[str, Any], ...], ...]


@dataclass(frozen=True)
class Group:
    """Collections that cross a boundary together.

    `axis` is the dim that their variables lose going in and gain coming out; `meta` is what the
    boxes are told then.

    >>> Group(Names.of("params"), 0, {"partition_name": "layers"}).axis
    0
    """

    cols: Names
    axis: int | None = None
    meta: Mapping[Any, Any] = field(default_factory=dict[Any, Any])


class State(NamedTuple):
    """What crosses a boundary inwards, as a pytree.

    `groups` holds for each group of the lift, and each root scope, its collections; `keys` holds
    for each root scope the keys of its streams.

    >>> sorted(State(({"params": {}},), ())._asdict())
    ['groups', 'keys']
    """

    groups: Groups
    keys: tuple[dict[str, jax.Array], ...]


@dataclass(frozen=True)
class Lift:
    """How scopes cross into one JAX transform.

    `run(pure, state, *args, **kwargs)` calls the transform on `pure`, a function of `(state,
    *args, **kwargs)` that returns its result and the groups that come out, and returns both.
    `ins` and `outs` say which collections go in and come out, the first match counts; `streams`
    says which RNG streams go in; with `rekey`, each stream goes in as a key drawn from it.

    `shardflax.core.transforms` builds all of the library's transforms from this one type.
    """

    run: Callable[..., tuple[Any, Groups]]
    ins: tuple[Group, ...] = (Group(ALL),)
    outs: tuple[Group, ...] = (Group(ALL),)
    streams: Names = ALL
    rekey: bool = False

    @classmethod
    def whole(
        cls,
        run: Callable[..., tuple[Any, Groups]],
        variables: CollectionFilter,
        rngs: CollectionFilter,
        rekey: bool = False,
    ) -> Lift:
        """A lift of all `variables` as one group that keeps its dims, and of the streams `rngs`."""
        group = (Group(Names.of(variables)),)
        return cls(run, group, group, Names.of(rngs), rekey)


@dataclass(frozen=True)
class Entry:
    """The Python-side part of one root scope as it crosses: hashable, compared by equality.

    >>> Entry(("block",), NONE, (), (), ((), (), ())) == Entry(
    ...     ("block",), NONE, (), (), ((), (), ())
    ... )
    True
    """

    path: tuple[str, ...]
    mutable: Names
    suffixes: tuple[tuple[str, tuple[str | int, ...]], ...]
    flags: tuple[tuple[str, Any], ...]
    node: Frozen


class Boundary:
    """One crossing of some root scopes, none of which lies below another.

    >>> scope = Scope(Store({"params": {"w": 1.0}}, {}, ALL))
    >>> lift = Lift(lambda pure, state: pure(state))
    >>> Boundary(lift, [scope]).call([lambda scopes: scopes[0].get_variable("params", "w")])
    1.0
    """

    def __init__(self, lift: Lift, roots: Sequence[Scope], home: int = 0) -> None:
        for scope in roots:
            scope.store.check()
        self.lift = lift
        self.roots = roots
        self.home = home
        self.nodes: tuple[Frozen, ...] = ()

    def call(self, fns: Sequence[Callable[..., Any]], *args: Any, **kwargs: Any) -> Any:
        """What the transform makes of `fns`, each called as `fn(scopes, *args, **kwargs)`."""
        state = self.take()
        entries = tuple(self._entry(scope) for scope in self.roots)
        outs = tuple(g.cols for g in self.lift.outs)
        pure = Pure(tuple(fns), entries, outs, self._traced, self.home)
        result, groups = self.lift.run(pure, state, *args, **kwargs)
        self.publish(groups)
        return result

    def _traced(self, nodes: tuple[Frozen, ...]) -> None:
        """Tracing may happen any number of times: only the last one counts."""
        self.nodes = nodes

    def _streams(self, scope: Scope) -> dict[str, Stream]:
        return {s: v for s, v in scope.store.streams.items() if s in self.lift.streams}

    def _entry(self, scope: Scope) -> Entry:
        mutable = NONE
        for group in self.lift.outs:
            mutable = mutable | group.cols
        path = () if self.lift.rekey else scope.below
        return Entry(
            path=scope.path,
            mutable=scope.store.mutable & mutable,
            suffixes=tuple(
                (s, () if self.lift.rekey else v.suffix + path)
                for s, v in sorted(self._streams(scope).items())
            ),
            flags=tuple(sorted(scope.store.flags.items())),
            node=scope.node.freeze(),
        )

    def take(self) -> State:
        """Variables and keys of the root scopes; keys are drawn now if the lift re-keys."""
        keys = tuple(
            {s: scope.make_rng(s) if self.lift.rekey else v.key for s, v in streams.items()}
            for scope in self.roots
            for streams in (self._streams(scope),)
        )
        groups: list[tuple[dict[str, Any], ...]] = []
        free = ALL
        for group in self.lift.ins:
            cols = group.cols & free
            free = free - cols
            groups.append(
                tuple(_told(boxes.remove_axis, group, _select(s, cols), s) for s in self.roots)
            )
        return State(tuple(groups), keys)

    def publish(self, groups: Groups) -> None:
        """Puts what came out into the root scopes."""
        for group, per_root in zip(self.lift.outs, groups, strict=True):
            for scope, collections in zip(self.roots, per_root, strict=True):
                for col, tree in collections.items():
                    scope.store.check_write(tree)
                    _replace(scope, col, _told(boxes.add_axis, group, {col: tree}, scope)[col])
        for scope, node in zip(self.roots, self.nodes, strict=True):
            scope.node.adopt(node)


def _told(
    change: Callable[..., Any], group: Group, tree: dict[str, Any], scope: Scope
) -> dict[str, Any]:
    """Collections of a scope after `change` (`add_axis`, `remove_axis`) of the boxes in them."""
    if group.axis is None:
        return tree
    try:
        return change(tree, group.axis, group.meta)
    except Exception as error:
        (col, *path) = boxes.culprit(tree, lambda box: change(box, group.axis, group.meta))
        error.add_note(f"The variable is {'/'.join((col, *scope.path, *path))}.")
        raise


@dataclass(frozen=True)
class Pure:
    """The inside of a boundary: a pure function of `(state, *args, **kwargs)`.

    Returns the result of `fn(scopes, *args, **kwargs)` and the groups that come out, where `fn` is
    the first of `fns`: most transforms have but one, for others see `branch`.  `home` is the root
    that the first argument of the call outside lies at.

    >>> entry = Entry((), ALL, (), (), ((), (), ()))
    >>> put = lambda scopes, x: scopes[0].put_variable("a", "b", x)
    >>> pure = Pure((put,), (entry,), (ALL,), print)
    >>> pure(State(((({},)),), ({},)), 3)
    (((), (), ()),)
    (None, (({'a': {'b': 3}},),))
    """

    fns: tuple[Callable[..., Any], ...]
    entries: tuple[Entry, ...]
    outs: tuple[Names, ...]
    traced: Callable[[tuple[Frozen, ...]], None] = field(compare=False)
    home: int = 0
    turn: int = 0
    ends: dict[int, tuple[Frozen, ...]] = field(default_factory=dict[int, Any], compare=False)

    def branch(self, i: int, turn: int = 0) -> Pure:
        """The same of `fns[i]`; keys are counted on from the end of turn `turn - 1`."""
        return replace(self, fns=(self.fns[i],), turn=turn)

    def __call__(self, state: State, *args: Any, **kwargs: Any) -> tuple[Any, Groups]:
        scopes = self.open(state)
        try:
            result = self.fns[0](scopes, *args, **kwargs)
            return result, self.close(scopes)
        finally:
            for scope in scopes:
                scope.store.end()

    def open(self, state: State) -> list[Scope]:
        """New scopes inside, one a root, with the state that came in."""
        scopes = [self._open(i, entry, state) for i, entry in enumerate(self.entries)]
        for scope, node in zip(scopes, self.ends.get(self.turn - 1, ()), strict=False):
            scope.node.count_on(node)
        return scopes

    def close(self, scopes: list[Scope]) -> Groups:
        """The groups that come out of such scopes."""
        self.ends[self.turn] = tuple(scope.node.freeze() for scope in scopes)
        self.traced(self.ends[max(self.ends)])
        return self._groups(scopes)

    @staticmethod
    def _open(i: int, entry: Entry, state: State) -> Scope:
        collections = {col: tree for group in state.groups for col, tree in group[i].items()}
        for col in collections:
            if col in entry.mutable:
                collections[col] = unfreeze(collections[col])
        suffixes = dict(entry.suffixes)
        streams = {s: Stream(key, suffixes[s]) for s, key in state.keys[i].items()}
        store = Store(collections, streams, entry.mutable, entry.path, dict(entry.flags))
        return Scope(store, (), Node.thaw(entry.node))

    def _groups(self, scopes: list[Scope]) -> Groups:
        writable = [scope.store.writable() for scope in scopes]
        groups: list[tuple[dict[str, Any], ...]] = []
        free = ALL
        for names in self.outs:
            cols = names & free
            free = free - cols
            groups.append(tuple({c: t for c, t in w.items() if c in cols} for w in writable))
        return tuple(groups)


def _select(scope: Scope, cols: Names) -> dict[str, Any]:
    """The collections among `cols` that have variables at or below the path of `scope`."""
    found = ((col, scope.collection(col)) for col in scope.store.collections if col in cols)
    return {col: tree for col, tree in found if tree}


def _replace(scope: Scope, col: str, tree: Any) -> None:
    """Makes `tree` the collection `col` of `scope`, in place of what it held."""
    parent = scope.store.collections
    for name in (col, *scope.below[:-1]) if scope.below else ():
        parent = parent.setdefault(name, {})
    parent[scope.below[-1] if scope.below else col] = tree
