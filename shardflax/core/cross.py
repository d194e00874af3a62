"""Crossing: how modules and variables go through a lift.

A bound module is no pytree.  On the way in it becomes a leafless slot, plus a *recipe*: its class,
its fields, where its scope lies relative to a root of the boundary, and how far it had got.
Inside, a module is built anew from the recipe, on the scopes inside.  Classes, methods and
functions as targets differ only in what is called on it then.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType, MappingProxyType, NoneType
from typing import Any, Protocol, TypeVar, cast, get_origin

import jax

from shardflax.core.boundary import Boundary, Lift
from shardflax.core.scope import Scope
from shardflax.core.transform_errors import TransformedMethodReturnValueError, TransformTargetError
from shardflax.core.variable import Variable

__all__ = ["Crossable", "Lifted", "cross", "lifted"]

T = TypeVar("T")


class Crossable:
    """What a module must offer to cross: see `shardflax.core.module.Module`."""

    scope: Scope | None

    def _recipe(self) -> tuple[dict[str, Any], Any]:
        """The fields to build it from, and a hashable note on how far it had got."""
        raise AssertionError("overridden by Module")

    @classmethod
    def _rebuild(cls, fields: dict[str, Any], scope: Scope, progress: Any) -> Any:
        """A module built from what `_recipe` gave, bound to `scope`."""
        raise AssertionError("overridden by Module")

    @classmethod
    def _inner_call(cls, fn: Callable[..., Any], outer: Any) -> Callable[..., Any]:
        """`fn`, to be called on the module inside; `outer` is what was called outside."""
        raise AssertionError("overridden by Module")


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Slot:
    """Stands for a module or variable in a tree of arguments."""

    index: int


@dataclass(frozen=True)
class _Place:
    """A scope, as a path below one of the roots of a boundary."""

    root: int
    path: tuple[str, ...]

    def find(self, roots: list[Scope]) -> Scope:
        return functools.reduce(Scope.at, self.path, roots[self.root])


@dataclass(frozen=True, eq=False)
class _ModuleRecipe:
    cls: Any
    fields: tuple[tuple[str, Any], ...]
    progress: Any
    place: _Place

    def build(self, roots: list[Scope], fill: Callable[[Any], Any]) -> Any:
        fields = {name: fill(value) for name, value in self.fields}
        return self.cls._rebuild(fields, self.place.find(roots), self.progress)

    # Fields may be unhashable: then they count in comparisons alone, arrays by identity.
    def __hash__(self) -> int:
        return hash((self.cls, self.place, len(self.fields)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _ModuleRecipe)
            and (self.cls, self.place, self.progress) == (other.cls, other.place, other.progress)
            and len(self.fields) == len(other.fields)
            and all(
                a == b and _same(x, y)
                for (a, x), (b, y) in zip(self.fields, other.fields, strict=True)
            )
        )


def _same(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if type(x) is not type(y) or hasattr(x, "__array__"):
        return False
    if isinstance(x, tuple | list):
        items, others = cast("list[Any]", x), cast("list[Any]", y)
        return len(items) == len(others) and all(map(_same, items, others))
    try:
        return bool(x == y)
    except (TypeError, ValueError):  # a container of arrays, or of tracers
        return False


@dataclass(frozen=True)
class _VariableRecipe:
    collection: str
    name: str
    unbox: bool
    place: _Place

    def build(self, roots: list[Scope], fill: Callable[[Any], Any]) -> Variable:
        return Variable(self.place.find(roots), self.collection, self.name, self.unbox)


@dataclass(frozen=True)
class _ScopeRecipe:
    place: _Place

    def build(self, roots: list[Scope], fill: Callable[[Any], Any]) -> Scope:
        return self.place.find(roots)


@dataclass(frozen=True)
class _Constant:
    """An unbound module: it crosses as it is."""

    value: Any

    def build(self, roots: list[Scope], fill: Callable[[Any], Any]) -> Any:
        return self.value


class _Unbinder:
    """Collects the modules and variables of trees, and the scopes that they need."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.index: dict[int, int] = {}
        self.recipes: list[Any] = []
        self.order: list[int] = []  # what is in the fields of a module stands before it

    def slots(self, tree: Any) -> Any:
        """`tree` with slots for modules and variables."""
        if isinstance(tree, _PLAIN):
            return tree

        def visit(x: Any) -> Any:
            return self._slot(x) if _crosses(x) else x

        return jax.tree.map(visit, tree, is_leaf=_crosses)

    def _slot(self, x: Any) -> _Slot:
        i = self.index.get(id(x))
        if i is None:
            i = self.index[id(x)] = len(self.found)
            self.found.append(x)
            self.recipes.append(None)
            self.recipes[i] = self._recipe(x)
            self.order.append(i)
        return _Slot(i)

    def _recipe(self, x: Any) -> Any:
        if isinstance(x, Variable):
            return _VariableRecipe(x.collection, x.name, x.unbox, _Place(-1, ()))
        if isinstance(x, Scope):
            return _ScopeRecipe(_Place(-1, ()))
        if x.scope is None:
            return _Constant(x)
        fields, progress = x._recipe()
        values = tuple((name, self.slots(value)) for name, value in fields.items())
        return _ModuleRecipe(type(x), values, progress, _Place(-1, ()))

    def roots(self) -> list[Scope]:
        """The scopes that all others lie at or below; afterwards every recipe has its place."""
        scopes = [_scope_of(x) for x in self.found]
        ordered = [s for i in self.order if (s := scopes[i]) is not None]
        roots: list[Scope] = []
        for scope in sorted(ordered, key=lambda s: len(s.below)):
            if _place(roots, scope) is None:
                roots.append(scope)
        roots.sort(key=lambda root: _first_below(root, ordered))
        for i, scope in enumerate(scopes):
            if scope is not None:
                self.recipes[i] = replace(self.recipes[i], place=_place(roots, scope))
        return roots


def _scope_of(x: Any) -> Scope | None:
    return x if isinstance(x, Scope) else x.scope


def _first_below(root: Scope, scopes: list[Scope]) -> int:
    return next(i for i, scope in enumerate(scopes) if _place([root], scope) is not None)


def _place(roots: list[Scope], scope: Scope) -> _Place | None:
    for i, root in enumerate(roots):
        depth = len(root.below)
        if root.store is scope.store and scope.below[:depth] == root.below:
            return _Place(i, scope.below[depth:])
    return None


def _is_slot(x: Any) -> bool:
    return isinstance(x, _Slot)


def _crosses(x: Any) -> bool:
    return isinstance(x, _CROSSES)


_CROSSES = (Crossable, Variable, Scope)
_PLAIN = (NoneType, bool, int, float, str, FunctionType, type, jax.Array)  # what holds none


_FUNCTION: Any = object()  # stands for the outer method where there is none
_NO_KWARGS: Mapping[str, Any] = MappingProxyType({})


class _Builder:
    """Builds what recipes say, each once.  Functions that call one another would be a cycle."""

    def __init__(self, roots: list[Scope], recipes: tuple[Any, ...]) -> None:
        self.roots = roots
        self.recipes = recipes
        self.built: dict[int, Any] = {}

    def fill(self, tree: Any) -> Any:
        """`tree` with what its slots stand for."""
        return jax.tree.map(self._visit, tree, is_leaf=_is_slot)

    def _visit(self, x: Any) -> Any:
        if not isinstance(x, _Slot):
            return x
        if x.index not in self.built:
            self.built[x.index] = self.recipes[x.index].build(self.roots, self.fill)
        return self.built[x.index]


@dataclass(frozen=True)
class _Inside:
    """A call of the target inside of the boundary: hashable, compared by equality."""

    fn: Callable[..., Any]
    outer: Any  # what was called outside: tells a method from a function
    target: Any  # the class that the first module is built as, if not its own
    first: Any
    recipes: tuple[Any, ...]

    def __call__(self, roots: list[Scope], *args: Any, **kwargs: Any) -> Any:
        fill = _Builder(roots, self.recipes).fill
        first = fill(self.first)
        fn = self.fn
        if isinstance(first, Crossable):
            fn = first._inner_call(fn, self.outer)  # pyright: ignore[reportPrivateUsage]
        result = fn(first, *fill(args), **fill(kwargs))
        for x in jax.tree.leaves(result, is_leaf=_crosses):
            if isinstance(x, Crossable | Variable):
                name = getattr(self.fn, "__name__", "call")
                raise TransformedMethodReturnValueError(name, type(x).__name__)
        return result


def cross(
    lift: Lift,
    fns: Sequence[Callable[..., Any]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] = _NO_KWARGS,
    outer: Any = _FUNCTION,
    target: Any = None,
) -> Any:
    """Calls `fns`, functions of a module or scope and more, on `args` through a lift.

    `outer` is the method that was called outside, if it was one, and `target` the class that the
    module is built as inside, if not its own.  Raises `TransformTargetError` if the first argument
    holds no bound module, and no scope.

    >>> import shardflax.nn as nn
    >>> def fn(dense):
    ...     lift = Lift(lambda pure, state: pure(state))
    ...     return cross(lift, [lambda m: m.features], (dense,))
    >>> nn.apply(fn, nn.Dense(2))({})
    2
    """
    unbinder = _Unbinder()
    first = unbinder.slots(args[0])
    if not any(isinstance(x, Crossable | Scope) for x in unbinder.found):
        found = type(args[0]).__name__
        raise TransformTargetError(f"{fns[0]!r}, called with {found}, not a module")
    rest, kwargs = (unbinder.slots(x) for x in (tuple(args[1:]), dict(kwargs)))
    roots = unbinder.roots()
    recipes = unbinder.recipes
    home = getattr(recipes[0], "place", _Place(0, ())).root
    if target is not None:
        recipes[0] = replace(recipes[0], cls=target)
    inside = [_Inside(fn, outer, target, first, tuple(recipes)) for fn in fns]
    return Boundary(lift, roots, home).call(inside, *rest, **kwargs)


# --- targets


class Lifted(Protocol):
    """A lifted transform: `transform(target, **options)` gives what `target` is, lifted."""

    def __call__(self, target: T, *args: Any, **kwargs: Any) -> T: ...


def lifted(
    factory: Callable[..., Lift | tuple[Lift, ...]], prefix: str, child_name: str | None = None
) -> Lifted:
    """A transform of module classes, methods and functions, from a function of options to a lift.

    The function may return several lifts, the outermost first.  `prefix` begins the names of lifted
    classes; `child_name` those that `Scope.child` gives to lifted functions (by default their own).
    The transform takes one option more than the function: `methods`, the names of the methods of a
    class to lift (by default `__call__`), or a dict from names to options for each.  This is how
    to write a transform of one's own: see `docs/design.md`.

    >>> import jax, jax.numpy as jnp, shardflax.nn as nn
    >>> from shardflax.core.boundary import Lift
    >>> def logged():
    ...     def run(pure, state, *args, **kwargs):
    ...         print("in with", [sorted(root) for root in state.groups[0]])
    ...         return pure(state, *args, **kwargs)
    ...
    ...     return Lift(run)
    >>> model = lifted(logged, "Logged")(nn.Dense)(2)
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
    in with [[]]
    >>> y = model.apply(variables, jnp.ones((1, 2)))
    in with [['params']]
    """

    @functools.wraps(factory)
    def transform(target: Any, *args: Any, methods: Any = None, **kwargs: Any) -> Any:
        target = get_origin(target) or target  # of a generic module with its types
        if inspect.isclass(target) and issubclass(target, Crossable):
            return _lift_class(target, factory, prefix, methods, args, kwargs)
        if isinstance(target, Crossable) or not callable(target):
            raise TransformTargetError(target)
        fn = _lift_function(target, _lifts(factory(*args, **kwargs)))
        if child_name is not None:
            vars(fn)["child_name"] = child_name
        return fn

    signature = inspect.signature(factory)
    extra = [
        inspect.Parameter("target", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        *signature.parameters.values(),
        inspect.Parameter("methods", inspect.Parameter.KEYWORD_ONLY, default=None),
    ]
    vars(transform)["__signature__"] = signature.replace(parameters=extra)
    return transform


def _lift_class(
    target: Any, factory: Any, prefix: str, methods: Any, args: Any, kwargs: Any
) -> Any:
    """One class per target and options: making a class is slow, and jit caches by it."""
    if methods is None or isinstance(methods, str):
        methods = (methods or "__call__",)
    if not isinstance(methods, Mapping):
        methods = dict.fromkeys(cast("Sequence[str]", methods), _NO_KWARGS)
    chosen = {name: {**kwargs, **own} for name, own in cast("dict[str, Any]", methods).items()}
    try:
        return _cached_class(target, factory, prefix, _Frozen(args), _Frozen(chosen))
    except TypeError:  # an option is not hashable
        return _new_class(target, factory, prefix, args, chosen)


class _Frozen:
    """Options as a key."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.key = _key(value)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self.key == other.key


def _key(value: Any) -> Any:
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return ("dict", tuple((_key(k), _key(v)) for k, v in items))
    if isinstance(value, list | tuple):
        items = cast("list[Any]", value)
        return (type(items), tuple(_key(v) for v in items))
    return (cast("type[Any]", type(value)), value)


@functools.lru_cache(maxsize=512)
def _cached_class(target: Any, factory: Any, prefix: str, args: _Frozen, methods: _Frozen) -> Any:
    return _new_class(target, factory, prefix, args.value, methods.value)


def _new_class(
    target: Any, factory: Any, prefix: str, args: Any, methods: Mapping[str, Any]
) -> Any:
    body: dict[str, Any] = {"__module__": target.__module__, "__doc__": target.__doc__}
    for name, options in methods.items():
        if not callable(getattr(target, name, None)):
            raise TransformTargetError(f"{target.__name__}.{name}, which is no method")
        lifts = _lifts(factory(*args, **options))
        body[name] = _lift_function(getattr(target, name), lifts, target)
    return type(target)(f"{prefix}{target.__name__}", (target,), body)


def _lifts(made: Lift | tuple[Lift, ...]) -> tuple[Lift, ...]:
    return (made,) if isinstance(made, Lift) else made


def _lift_function(fn: Callable[..., Any], lifts: tuple[Lift, ...], target: Any = None) -> Any:
    for lift in reversed(lifts):
        fn = _lift_once(fn, lift, target)
    return fn


def _lift_once(fn: Callable[..., Any], lift: Lift, target: Any) -> Any:
    @functools.wraps(fn)
    def lifted_fn(*args: Any, **kwargs: Any) -> Any:
        if not args:
            raise TransformTargetError(f"{fn!r}, called without a module")
        return cross(lift, (fn,), args, kwargs, lifted_fn, target)

    vars(lifted_fn)["lifted"] = True
    return lifted_fn
