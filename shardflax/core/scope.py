"""Scopes: one run's state, seen from one module path.

Array state lives in one place, a `Store`: collections of variables, RNG streams, and which
collections may change.  Python-side state lives in one place, a tree of `Node`s: names in use,
the numbering of automatic names, how many keys were drawn.  A `Scope` is a cursor over both.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any, cast

import jax

from shardflax.core import boxes, staging
from shardflax.core.errors import (
    ApplyScopeInvalidVariablesStructureError,
    ApplyScopeInvalidVariablesTypeError,
    InvalidRngError,
    InvalidScopeError,
    JaxTransformError,
    ModifyScopeVariableError,
    NameInUseError,
    ScopeCollectionNotFound,
    ScopeParamNotFoundError,
    ScopeParamShapeError,
    ScopeVariableNotFoundError,
    did_you_mean,
)
from shardflax.core.frozen_dict import unfreeze
from shardflax.core.names import CollectionFilter, Names
from shardflax.core.node import Node, Path
from shardflax.core.rng import Stream, is_keyless, open_streams
from shardflax.core.shapes import shapes_of, stored_shapes
from shardflax.core.variable import Variable, is_array

__all__ = ["Scope", "Store", "Turns", "open_store"]


class Turns:
    """Lets one thread after the other work with the state of a run.

    >>> with Turns() as turns, turns:
    ...     print("the same thread may enter twice")
    the same thread may enter twice
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> Turns:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()  # copies are entered apart from it


class Store:
    """The array state of one run, or of the inside of one lift, below one path.

    >>> Store({"params": {"w": 1.0}, "cache": {}}, {}, Names.of(True)).writable()
    {'params': {'w': 1.0}}
    """

    __slots__ = (
        "adopted",
        "collections",
        "flags",
        "live",
        "lock",
        "mutable",
        "path",
        "streams",
        "trace",
    )

    def __init__(
        self,
        collections: dict[str, Any],
        streams: dict[str, Stream],
        mutable: Names,
        path: Path = (),
        flags: Mapping[str, Any] | None = None,
    ) -> None:
        self.collections = collections
        self.streams = streams
        self.mutable = mutable
        self.path = path
        self.flags = flags or {}
        self.adopted: dict[int, Any] = {}  # modules from outside, and their copies in this run
        self.live = True
        self.lock: Turns | None = None  # where threads may meet: in modules that `bind` returns
        self.trace = staging.current_trace()

    def end(self) -> None:
        """Ends the run, and lets go of its modules, which hold this store."""
        self.live = False
        self.adopted = {}

    def check(self) -> None:
        """Raises unless the run is still going on."""
        if not self.live:
            raise InvalidScopeError(self.path)

    def check_write(self, value: Any) -> None:
        """Raises unless `value` may outlive every trace that was entered after the run began."""
        if not self.live:
            raise InvalidScopeError(self.path)
        if staging.escapes(value, self.trace):
            raise JaxTransformError(self.path)

    def writable(self) -> dict[str, Any]:
        """The collections that may change, without empty ones."""
        return {c: tree for c, tree in self.collections.items() if c in self.mutable and tree}


def open_store(
    variables: Mapping[str, Any],
    rngs: Any,
    mutable: CollectionFilter | Names,
    flags: Mapping[str, Any] | None = None,
) -> Store:
    """The array state of a new run.

    >>> store = open_store({"params": {"w": 1.0}}, None, "params")
    >>> sorted(store.collections), "params" in store.mutable
    (['params'], True)
    """
    _check_variables(variables)
    names = Names.of(mutable)
    collections = {c: unfreeze(t) if c in names else t for c, t in variables.items()}
    return Store(collections, open_streams(rngs), names, (), flags)


def _check_variables(given: Any) -> None:
    if not isinstance(given, Mapping):
        raise ApplyScopeInvalidVariablesTypeError(given)
    variables = cast("Mapping[Any, Any]", given)
    if not all(isinstance(c, str) and isinstance(t, Mapping) for c, t in variables.items()):
        raise ApplyScopeInvalidVariablesTypeError(variables)
    if isinstance(variables.get("params", {}).get("params"), Mapping):
        raise ApplyScopeInvalidVariablesStructureError(variables)


def _into(old: Any, new: Any) -> Any:
    """`old` with the entries of `new`, if both are dicts that may change; otherwise `new`."""
    if not (isinstance(old, dict) and isinstance(new, Mapping)):
        return new
    known, items = cast("dict[str, Any]", old), cast("Mapping[str, Any]", new).items()
    return {**known, **{key: _into(known.get(key), value) for key, value in items}}


_REQUIRED: Any = object()
_new = object.__new__


class Scope:
    """The state of a run, as seen from one path.

    Made by `init`, `apply` and `bind`, or from variables by `Scope(variables, rngs=...,
    mutable=...)`.  Two scopes are equal if they are the same place of the same run.

    >>> scope = Scope({"params": {"w": 1.0}})
    >>> scope.param("w", lambda key: 2.0)
    1.0
    """

    __slots__ = ("_reads", "below", "node", "parent", "store")

    def __init__(
        self,
        variables: Store | Mapping[str, Any],
        path: Path = (),
        node: Node | None = None,
        parent: Scope | None = None,
        *,
        rngs: Any = None,
        mutable: CollectionFilter = False,
        flags: Mapping[str, Any] | None = None,
    ) -> None:
        opened = isinstance(variables, Store)
        self.store = variables if opened else open_store(variables, rngs, mutable, flags)
        self.below = path  # seen from the root of the store
        self.node = node if node is not None else Node()
        self.parent = parent
        self._reads: dict[str, Any] = {}

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Scope)
            and self.store is other.store
            and self.below == other.below
            and self.node is other.node
        )

    def __hash__(self) -> int:
        return hash((id(self.store), self.below))

    # --- where

    @property
    def path(self) -> Path:
        """The path from the root of the whole run; also inside of a lift."""
        return self.store.path + self.below

    @property
    def path_text(self) -> str:
        return "/" + "/".join(self.path)

    @property
    def name(self) -> str | None:
        """The last name of the path; `None` at the root."""
        return self.path[-1] if self.path else None

    @property
    def root(self) -> Scope:
        """The scope that the others of the run, or of the inside of a lift, lie below."""
        return self if self.parent is None else self.parent.root

    @property
    def invalid(self) -> bool:
        """True after the run has ended."""
        return not self.store.live

    def invalidate(self) -> None:
        """Ends the run: none of its scopes can draw keys or be written to any more."""
        self.store.end()

    @contextlib.contextmanager
    def temporary(self) -> Generator[Scope]:
        """Within this context the scope is valid; at its end the run ends.

        >>> with Scope({"params": {"w": 1.0}}).temporary() as root:
        ...     w = root.get_variable("params", "w")
        >>> root.invalid
        True
        """
        try:
            yield self
        finally:
            self.invalidate()

    def has_flag(self, key: str) -> bool:
        return key in self.store.flags

    def get_flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """A flag of the run; ValueError if there is none and no `default` is given."""
        if key not in self.store.flags and default is _REQUIRED:
            raise ValueError(f"at {self.path_text}: the run has no flag {key!r}.")
        return self.store.flags.get(key, default)

    # --- children

    def at(self, name: str) -> Scope:
        """The scope of the child `name`, which need not be reserved."""
        made = _new(Scope)  # as `Scope(...)` makes it, in one call less
        made.store = self.store
        made.below = (*self.below, name)
        made.node = self.node.child(name)
        made.parent = self
        made._reads = {}
        return made

    def take(self, name: str) -> Scope:
        """The scope of a new child; raises `NameInUseError` if the name is taken."""
        node = self.node
        if node.owners is None and name not in node.reserved:
            node.reserved[name] = {None}
        else:
            self.reserve(name)
        made = self.at(name)
        below = made.node
        if below.reserved or below.cursor or below.owners:  # of what was there before
            below.renew()
        return made

    def beside(self) -> Scope:
        """The same place for another module: each name at it belongs to one of the two."""
        return Scope(self.store, self.below, self.node.beside(), self.parent)

    def push(self, name: str | None = None, prefix: str = "", reuse: bool = False) -> Scope:
        """The scope of a new child: `name`, or the first free `prefix0`, `prefix1`, ...

        Raises `NameInUseError` if the name is taken, unless it may be the same one again: `reuse`.

        >>> scope = Scope({})
        >>> scope.push("dense").path_text, scope.push(prefix="dense_").path_text
        ('/dense', '/dense_0')
        """
        self.store.check()
        if name is None:
            name = self.default_name(prefix)
        if not (reuse and self.name_reserved(name)):
            self.reserve(name)
        return self.at(name)

    def child(
        self,
        fn: Callable[..., Any],
        name: str | None = None,
        prefix: str | None = None,
        named_call: bool = True,
        **partial_kwargs: Any,
    ) -> Callable[..., Any]:
        """`fn` as a function that runs in a child scope, named after it unless said otherwise.

        Each call finds the same variables: calling it twice shares them.  `named_call` lets the
        name of the child appear in profiles.

        >>> import jax
        >>> def dense(scope, x):
        ...     return x * scope.param("w", lambda key: 2.0)
        >>> def twice(scope, x):
        ...     layer = scope.child(dense, "layer")
        ...     return layer(layer(x))
        >>> Scope({"params": {"layer": {"w": 3.0}}}).child(twice)(1.0)
        Traceback (most recent call last):
        ...
        shardflax.core.errors.ScopeParamNotFoundError: at /twice_0/layer: ...
        >>> twice(Scope({"params": {"layer": {"w": 3.0}}}), 1.0)
        9.0
        """
        if name is None:
            called = getattr(fn, "child_name", None) or getattr(fn, "__name__", None)
            if prefix is None:
                prefix = f"{called}_" if called else ""
            name = self.default_name(prefix)
        scope = self.push(name)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            context = jax.named_scope(name) if named_call else contextlib.nullcontext()
            with context:
                return fn(scope.rewound(), *args, **{**partial_kwargs, **kwargs})

        return call

    def rewound(self, rewind_rngs: bool = False) -> Scope:
        """This scope with no name in use; with `rewind_rngs`, with no key drawn either.

        >>> scope = Scope({"params": {"w": 1.0}})
        >>> scope.reserve("w")
        >>> scope.name_reserved("w"), scope.rewound().name_reserved("w")
        (True, False)
        """
        self.store.check()
        node = Node() if rewind_rngs else Node(self.node)
        return Scope(self.store, self.below, node, self.parent)

    def name_reserved(self, name: str, col: str | None = None) -> bool:
        """True if `name` stands for a submodule, or (with `col`) for a variable of `col`."""
        taken = self.node.reserved.get(name)
        if taken is None:
            return False
        return col is None or None in taken or col in taken

    def reserve(self, name: str, col: str | None = None) -> None:
        """Takes `name` for a submodule, or for a variable of the collection `col`.

        Raises `NameInUseError` if it is taken: a submodule excludes all else, variables of
        different collections may share a name.
        """
        node = self.node
        taken = node.reserved.get(name)
        if taken is None and (node.owners is None or node.claim(name, col)):
            node.reserved[name] = {col}
        elif taken is None or self.name_reserved(name, col) or not node.claim(name, col):
            raise NameInUseError("submodule" if col is None else "variable", name, self.path_text)
        else:
            taken.add(col)

    def default_name(self, prefix: str) -> str:
        """The first of `prefix0`, `prefix1`, ... that is free."""
        numbered = (f"{prefix}{i}" for i in itertools.count())
        return next(name for name in numbered if name not in self.node.reserved)

    def auto_name(self, prefix: str) -> str:
        """The next free `prefix_0`, `prefix_1`, ..."""
        count = self.node.cursor.get(prefix, 0)
        self.node.cursor[prefix] = count + 1
        return f"{prefix}_{count}"

    # --- rngs

    @property
    def rngs(self) -> dict[str, Stream]:
        """The RNG streams at this path, each with a method `as_jax_rng`; none of them is counted.

        >>> stream = Scope({}, rngs=jax.random.key(0)).rngs["params"]
        >>> bool(stream.as_jax_rng() == jax.random.key(0))
        True
        """
        streams = self.store.streams.items()
        return {name: Stream(s.key, s.suffix + self.below) for name, s in streams}

    def has_rng(self, stream: str) -> bool:
        return stream in self.store.streams

    def make_rng(self, stream: str = "params") -> jax.Array:
        """A new key of `stream`; of the stream `params` where the run has no `stream`.

        Raises `InvalidRngError` if it has neither.
        """
        found, path = self._count(stream)
        return found.draw(path)

    def _init_key(self, init_fn: Callable[..., Any]) -> jax.Array:
        """A key for an initializer; any, for one that ignores it."""
        found, path = self._count("params")
        return found.key if is_keyless(init_fn) else found.draw(path)

    def _count(self, stream: str) -> tuple[Stream, tuple[str | int, ...]]:
        """Counts one key more: the stream it comes from, and the path to fold in."""
        self.store.check()
        if stream not in self.store.streams:
            if "params" not in self.store.streams:
                raise InvalidRngError(self._no_stream(stream))
            stream = "params"
        count = self.node.counts[stream] = self.node.counts.get(stream, 0) + 1
        return self.store.streams[stream], (*self.below, count)

    def _no_stream(self, stream: str) -> str:
        known = did_you_mean(stream, self.store.streams) if self.store.streams else "got none."
        return (
            f"at {self.path_text}: a key of the RNG stream {stream!r} is needed, and the run has "
            f"no such stream; {known} Pass rngs={{{stream!r}: jax.random.key(seed)}} to init or "
            f"apply; inside a transform, name the stream in its split_rngs or rngs."
        )

    # --- variables

    def collection(self, col: str) -> Mapping[str, Any]:
        """The variables of `col` at this path; empty if there are none."""
        found = self._reads.get(col)
        if found is not None:
            return found
        found: Any = self.store.collections.get(col) or {}
        for name in self.below:
            found = found.get(name)
            if found is None:
                return {}
        if col not in self.store.mutable:
            self._reads[col] = found
        return found

    def _writable(self, col: str) -> dict[str, Any]:
        tree = self.store.collections.setdefault(col, {})
        for name in self.below:
            tree = tree.setdefault(name, {})
        return tree

    def is_mutable_collection(self, col: str) -> bool:
        return col in self.store.mutable

    def is_collection_empty(self, col: str) -> bool:
        """True if no variable of `col` lies at or below this path."""
        return not self.collection(col)

    def variables(self) -> dict[str, Any]:
        """The collections of variables at and below this path."""
        found = {col: self.collection(col) for col in self.store.collections}
        return {col: tree for col, tree in found.items() if tree or not self.below}

    def mutable_variables(self) -> dict[str, Any]:
        """Those of `variables` that may change."""
        return {col: t for col, t in self.variables().items() if col in self.store.mutable}

    def has_variable(self, col: str, name: str) -> bool:
        return name in self.collection(col)

    def get_variable(self, col: str, name: str, default: Any = None) -> Any:
        return self.collection(col).get(name, default)

    def put_variable(self, col: str, name: str, value: Any) -> None:
        """Writes a variable; a dict is written into the dict that is there, if one is.

        Raises `ModifyScopeVariableError` if the collection may not change.
        """
        self.store.check_write(value)
        if col not in self.store.mutable:
            raise ModifyScopeVariableError(col, name, self.path_text)
        here = self._writable(col)
        here[name] = _into(here.get(name), value) if isinstance(value, Mapping) else value

    def variable(
        self,
        col: str,
        name: str,
        init_fn: Callable[..., Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Variable:
        """The variable `name` of `col`, made by `init_fn(*args)` if it is not there."""
        unboxed = kwargs.pop("unbox", True)
        self.reserve(name, col)
        if not self.has_variable(col, name):
            if not self.is_mutable_collection(col) or init_fn is None:
                if not self.store.collections.get(col):
                    raise ScopeCollectionNotFound(col, name, self.path_text)
                raise ScopeVariableNotFoundError(name, col, self.path_text, self.collection(col))
            self.put_variable(col, name, init_fn(*args, **kwargs))
        return Variable(self, col, name, unbox=unboxed)

    def param(self, name: str, init_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The parameter `name`, made by `init_fn(key, *args)` if it is not there.

        Raises `ScopeParamShapeError` if it is there with other shapes than `init_fn` gives.
        """
        unboxed = kwargs.pop("unbox", True)
        self.reserve(name, "params")
        params = self.collection("params")
        if name in params:
            value = params[name]
            # The common case, and the cheap one: init_fn(key, shape, ...) and an array of that
            # shape.  Only a tuple is a shape here: comparing with an array would be an array.
            aval = getattr(value, "aval", None)  # of a tracer, much cheaper to ask
            boxed = aval is None and unboxed and boxes.is_box(value)
            plain = boxes.unbox(value) if boxed else value
            told = getattr(plain, "aval", plain) if aval is None else aval
            if args and type(args[0]) is tuple and getattr(told, "shape", None) == args[0]:
                return plain
            expected, found = shapes_of(init_fn, args, kwargs), stored_shapes(value)
            if expected != found:
                raise ScopeParamShapeError(name, self.path_text, expected, found)
        elif self.is_mutable_collection("params"):
            value = init_fn(self._init_key(init_fn), *args, **kwargs)
            self.store.check_write(value)
            self._writable("params")[name] = value
        elif not self.store.collections.get("params"):
            raise ScopeCollectionNotFound("params", name, self.path_text)
        else:
            raise ScopeParamNotFoundError(name, self.path_text, params)
        return boxes.unbox(value) if unboxed and not is_array(value) else value
